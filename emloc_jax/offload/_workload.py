"""What is to be trained, as far as time and memory depend on it."""

import dataclasses
import functools

import jax.numpy as jnp

from emloc_jax.errors import ConfigError, ProjectorError

__all__ = ["BlockShape", "Setting", "Workload"]

Subspace = int | float


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """Parameters of a block, or of what lies outside the blocks.

    Attributes:
      kernels: `(d_in, d_out)` of each kernel whose gradient may be compressed.
      host: other elements that Adam updates on the host; their gradients are sent whole.
      device: other elements that Adam updates on the device.
      frozen: elements that are not trained.
      flops: per token of a forward pass, beyond the kernels' products (attention).
      boundary: numbers per token kept from the forward to the backward pass. None: the first
        kernel's d_in, which is right for a block that is computed again.
      working: numbers per token alive while the block's backward pass runs. None: the sum of all
        d_in and d_out, an estimate.

    Example:
      >>> block = BlockShape(((8, 8), (8, 32), (32, 8)), frozen=16)
      >>> block.elements, block.sent(None), block.sent(Setting(4))
      (592, 576, 48)
    """

    kernels: tuple[tuple[int, int], ...]
    host: int = 0
    device: int = 0
    frozen: int = 0
    flops: float = 0.0
    boundary: int | None = None
    working: int | None = None

    @property
    def kernel_elements(self) -> int:
        """Sum of `d_in * d_out`."""
        return sum(d_in * d_out for d_in, d_out in self.kernels)

    @property
    def trained(self) -> int:
        """Elements that are trained, wherever."""
        return self.kernel_elements + self.host + self.device

    @property
    def elements(self) -> int:
        """All elements."""
        return self.trained + self.frozen

    def cores(self, setting: "Setting") -> tuple[tuple[int, int], ...]:
        """`(s_in, s_out)` of each kernel.

        Raises:
          ProjectorError: the subspace does not fit a kernel, or is too small for `nnz`.
        """
        return tuple(_core(setting, d_in, d_out) for d_in, d_out in self.kernels)

    def sent(self, setting: "Setting | None") -> int:
        """Elements that cross the link each way; without a setting, those of full gradients."""
        if setting is None:
            return self.kernel_elements + self.host
        return sum(s_in * s_out for s_in, s_out in self.cores(setting)) + self.host


@dataclasses.dataclass(frozen=True)
class Setting:
    """What can be chosen.

    Attributes:
      subspace: `s`, or a fraction of each side.
      nnz: non-zeros per projector row.
      wire: dtype of gradients and updates on the link.
      cached: products with dense copies of the projectors.

    Raises:
      ConfigError: an unknown dtype, or `nnz` below 1.
    """

    subspace: Subspace = 0.5
    nnz: int = 4
    wire: str = "bfloat16"
    cached: bool = False

    def __post_init__(self):
        dtype_bytes(self.wire)
        if self.nnz < 1:
            raise ConfigError(f"nnz is {self.nnz}; a projector row has at least 1 non-zero.")

    @property
    def wire_bytes(self) -> int:
        """Bytes per element on the link."""
        return dtype_bytes(self.wire)

    def __str__(self):
        return f"subspace {self.subspace}, nnz {self.nnz}, {self.wire} wire"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
      blocks: shallowest first.
      tokens: of one micro-batch.
      outside: embedding, head and last norm.
      embed_seconds, head_seconds: device time before and after the blocks, per micro-batch.
      param_dtype: of parameters and activations.
      rounding_bytes: per trained element on the device, for what rounding keeps: 0, 2 for Kahan
        sums in bf16, 4 for an fp32 master copy.
      workspace: other bytes on the device (logits, the runtime).
      micro_batches: per optimizer step.
      clip: whether gradients are clipped by their global norm.

    Raises:
      ConfigError: no block, no token, no micro-batch, or an unknown dtype.
    """

    blocks: tuple[BlockShape, ...]
    tokens: int
    outside: BlockShape = BlockShape(())
    embed_seconds: float = 0.0
    head_seconds: float = 0.0
    param_dtype: str = "bfloat16"
    rounding_bytes: int = 0
    workspace: int = 0
    micro_batches: int = 1
    clip: bool = False

    def __post_init__(self):
        dtype_bytes(self.param_dtype)
        if not self.blocks or self.tokens < 1 or self.micro_batches < 1:
            raise ConfigError(
                f"A workload of {len(self.blocks)} blocks, {self.tokens} tokens and "
                f"{self.micro_batches} micro-batches was given; each must be at least 1."
            )

    @property
    def parts(self) -> tuple[BlockShape, ...]:
        """The blocks, and what lies outside them."""
        return (*self.blocks, self.outside)

    @property
    def model_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(part.elements for part in self.parts) * dtype_bytes(self.param_dtype)


def _core(setting: Setting, d_in: int, d_out: int) -> tuple[int, int]:
    subspace = setting.subspace
    if isinstance(subspace, int):
        s_in = s_out = subspace
        fits = 1 <= subspace <= min(d_in, d_out)
    else:
        s_in, s_out = max(1, round(subspace * d_in)), max(1, round(subspace * d_out))
        fits = 0 < subspace <= 1
    if not fits:
        raise ProjectorError(
            f"A subspace of {subspace} was asked for, and there is a kernel of shape "
            f"({d_in}, {d_out}). Give a whole number from 1 to {min(d_in, d_out)}, or a fraction "
            "of each side in (0, 1]."
        )
    if setting.nnz > min(s_in, s_out):
        raise ProjectorError(
            f"nnz is {setting.nnz}, and the kernel of shape ({d_in}, {d_out}) gets a subspace of "
            f"({s_in}, {s_out}): a row's non-zeros lie in distinct columns. Lower nnz, or enlarge "
            "the subspace."
        )
    return s_in, s_out


@functools.cache
def dtype_bytes(name: str) -> int:
    """Bytes of one number.

    Raises:
      ConfigError: not a floating-point dtype.

    Example:
      >>> dtype_bytes("bfloat16")
      2
    """
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ConfigError(f"'{name}' is no floating-point dtype; give float32 or bfloat16.")
    return dtype.itemsize
