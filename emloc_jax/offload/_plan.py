"""Which parameters of a block stack are trained, and where: rules become a plan per block."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emloc_jax.errors import ConfigError, UnsupportedKernelError
from emloc_jax.kernels import KernelSpec, find_kernels, flatten_leaves, match_rules

__all__ = ["TREATMENTS", "Plan", "default_rules", "make_plan", "match_treatments"]

TREATMENTS = ("subspace", "host", "device", "frozen")
Rules = Sequence[tuple[str, str]] | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each leaf of one block (or of what is outside the blocks) is treated.

    Attributes:
      kernels: path to kernel, for those whose gradient goes through a `SubspaceKernel`.
      host: other leaves that Adam updates on the host.
      device: leaves that Adam updates on the device.
      decaying: trained leaves with weight decay: all but those named `scale` or `bias`.
    """

    kernels: dict[str, KernelSpec]
    host: tuple[str, ...]
    device: tuple[str, ...]
    decaying: frozenset[str]

    @property
    def trained(self) -> bool:
        """Whether anything is."""
        return bool(self.kernels or self.host or self.device)

    @property
    def dense(self) -> tuple[str, ...]:
        """Trained leaves that are no kernels of a subspace."""
        return self.host + self.device


def make_plan(
    params: Mapping[str, Any],
    treatments: Mapping[str, str],
    *,
    prefix: str = "",
    apply: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
) -> Plan:
    """Plan of one block.

    Args:
      params: its parameters (shapes suffice).
      treatments: full path to treatment, from `match_treatments`.
      prefix: what its paths are called by in full, `layers` say; "" outside the blocks.
      apply: `apply({"params": params}, *inputs)`; None where nothing can be compressed.
      inputs: what the block takes (shapes suffice).

    Raises:
      UnsupportedKernelError: a leaf to compress is no kernel, or one without a handler.
    """
    full = {path: full_path(prefix, path) for path in flatten_leaves(params)}
    chosen: dict[str, list[str]] = {treatment: [] for treatment in TREATMENTS}
    for path, name in full.items():
        chosen[treatments[name]].append(path)
    specs: dict[str, KernelSpec] = {}
    if chosen["subspace"] and apply is not None:
        specs = find_kernels(apply, params, *inputs)
    for path in chosen["subspace"]:
        spec = specs.get(path)
        if spec is None or spec.handler is None or spec.tied:
            reason = "it is no kernel of a block."
            if spec is not None:
                reason = spec.reason or "it is a table that is looked up, too."
            raise UnsupportedKernelError(
                f"'{full[path]}' was to be trained in a subspace, but {reason} Train it as 'host' "
                "or 'device', or freeze it."
            )
    kernels = {path: specs[path] for path in chosen["subspace"]}
    trained = [*kernels, *chosen["host"], *chosen["device"]]
    decaying = frozenset(p for p in trained if p.split("/")[-1] not in ("scale", "bias"))
    return Plan(kernels, tuple(chosen["host"]), tuple(chosen["device"]), decaying)


def full_path(prefix: str, path: str) -> str:
    """The path by which rules know a leaf of a block.

    Example:
      >>> full_path("layers", "mlp/up_proj/kernel"), full_path("", "norm/scale")
      ('layers/mlp/up_proj/kernel', 'norm/scale')
    """
    return f"{prefix}/{path}" if prefix else path


def default_rules(name: str) -> list[tuple[str, str]]:
    """All kernels of the blocks in subspaces; the rest is frozen."""
    return [(f"{name}/.*/kernel", "subspace")]


def match_treatments(rules: Rules, paths: Sequence[str]) -> dict[str, str]:
    """Treatment of each path by the first rule that matches it; without one it is frozen.

    Args:
      rules: ordered `(regex, treatment)`, with `subspace` for kernels whose gradient is compressed
        (sent whole by a schedule that does not compress), `host` and `device` for leaves with plain
        Adam there, `frozen` for the rest.
      paths: all paths; a block's are those of its kind, `layers/mlp/up_proj/kernel`.

    Raises:
      ConfigError: a treatment that does not exist, or rules that train nothing.
      UnmatchedRuleError: a rule matches nothing.

    Example:
      >>> match_treatments([("a/kernel", "subspace")], ["a/kernel", "b/scale"])
      {'a/kernel': 'subspace', 'b/scale': 'frozen'}
    """
    items = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for rule, treatment in items:
        if treatment not in TREATMENTS:
            raise ConfigError(
                f"Rule '{rule}' asks for '{treatment}'; there are {', '.join(TREATMENTS)}."
            )
    matched = match_rules(items, paths)
    if all(treatment == "frozen" for treatment in matched.values()):
        raise ConfigError("The rules leave every parameter frozen; nothing would be trained.")
    return {path: matched.get(path, "frozen") for path in paths}
