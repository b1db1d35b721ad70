"""Which kernels are to be compressed, and why the others are not."""

import logging
from collections.abc import Mapping, Sequence

from emloc_jax.emulator._ranks import break_even_rank
from emloc_jax.errors import UnmatchedRuleError
from emloc_jax.kernels import KernelSpec, match_rules, select

__all__ = ["apply_rules", "candidates"]

logger = logging.getLogger(__name__)

Reasons = dict[str, tuple[str, str]]


def candidates(
    kernels: Mapping[str, KernelSpec],
    *,
    skip: str | Sequence[str] = (),
    include_tied: bool = False,
    allow_materialize: bool = False,
) -> tuple[dict[str, KernelSpec], Reasons]:
    """Splits `kernels` into those that may be compressed and the rest.

    Returns:
      The candidates, and `{path: (status, reason)}` of the others, with status `skipped`, `kept`
      or `unsupported`.

    Raises:
      UnmatchedRuleError: an expression in `skip` matches no kernel.
    """
    skipped = set(select(skip, kernels)) if skip else set()
    chosen: dict[str, KernelSpec] = {}
    others: Reasons = {}
    for path, spec in kernels.items():
        if path in skipped:
            others[path] = ("skipped", "on the skip list")
        elif spec.tied and not include_tied:
            others[path] = ("kept", "tied embedding")
        elif spec.handler is None and not allow_materialize:
            others[path] = ("unsupported", spec.reason)
            logger.warning("Kernel '%s' (%s) stays whole: %s", path, spec.module_type, spec.reason)
        elif break_even_rank(spec.d_in, spec.d_out) == 0:
            others[path] = ("kept", "no rank makes it smaller")
        else:
            chosen[path] = spec
    return chosen, others


def apply_rules(
    name: str,
    rules: float | Mapping[str, float] | Sequence[tuple[str, float]],
    chosen: Mapping[str, KernelSpec],
    others: Mapping[str, tuple[str, str]],
) -> dict[str, float]:
    """A value per candidate, from one number for all or from ordered rules.

    Args:
      name: of the argument, for messages.
      rules: a number, or `(regex, value)` pairs.
      chosen: the candidates.
      others: why the other kernels are none.

    Raises:
      UnmatchedRuleError: a rule matches no kernel, or only kernels that are no candidates.
    """
    if isinstance(rules, (int, float)):
        return dict.fromkeys(chosen, rules)
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    match_rules(pairs, [*chosen, *others])  # Raises for a rule that matches nothing at all.
    for pattern, _ in pairs:
        try:
            match_rules([(pattern, None)], chosen)
        except UnmatchedRuleError as error:
            path = next(iter(match_rules([(pattern, None)], others)))
            raise UnmatchedRuleError(
                f"Rule '{pattern}' in `{name}` matches only kernels that are not compressed, such "
                f"as '{path}': {others[path][1]}. Drop the rule, or pass `include_tied=True` for "
                "tied embeddings and `allow_materialize=True` for kernels without a handler."
            ) from error
    return match_rules(pairs, chosen) if chosen else {}
