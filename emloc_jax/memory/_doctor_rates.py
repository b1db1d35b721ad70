"""Measured speeds of a machine, as plain values."""

import dataclasses

__all__ = ["LinkRates", "ProductRate", "Rates"]


@dataclasses.dataclass(frozen=True)
class LinkRates:
    """One way to cross between device and host.

    Attributes:
      link: name of the implementation.
      to_host: bytes per second down; None: no copy is made, the host looks at the same bytes.
      to_device: bytes per second up.
      latency: seconds of a copy of nothing.
    """

    link: str
    to_host: float | None
    to_device: float
    latency: float


@dataclasses.dataclass(frozen=True)
class ProductRate:
    """Square matrix products on the device.

    Attributes:
      dtype: of the matrices.
      precision: what was asked for; None: the default.
      width: rows and columns.
      flops: floating-point operations per second.
    """

    dtype: str
    precision: str | None
    width: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds.

    Attributes:
      links: ways between device and host that the device has.
      products: of the device.
      fp32_error: relative error (Frobenius norm) of a default fp32 product, by NumPy in float64.
      host_adam: elements that Adam updates on the host, per second.
      disk_write: bytes per second to the place of the runs, flushed; None: it could not be written.
      disk_read: bytes per second back, after the system was asked to forget them; None: the same.
    """

    links: tuple[LinkRates, ...]
    products: tuple[ProductRate, ...]
    fp32_error: float
    host_adam: float
    disk_write: float | None
    disk_read: float | None

    def link(self, name: str) -> LinkRates | None:
        """The link of that name."""
        return next((link for link in self.links if link.link == name), None)

    def product(self, dtype: str, precision: str | None = None) -> float | None:
        """FLOP/s of a kind of product."""
        found = (p.flops for p in self.products if (p.dtype, p.precision) == (dtype, precision))
        return next(found, None)
