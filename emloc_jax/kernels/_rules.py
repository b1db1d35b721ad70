"""Ordered path rules that report what they matched and refuse to match nothing."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from emloc_jax.errors import UnmatchedRuleError

__all__ = ["Rules", "match_rules", "select"]

T = TypeVar("T")
Rules = Mapping[str, T] | Sequence[tuple[str, T]]


def match_rules(rules: Rules[T], paths: Iterable[str]) -> dict[str, T]:
    """Assigns each path the value of the first rule that matches it.

    A rule is a regular expression that must match the whole path, with or without its last part
    `/kernel`. Paths that no rule matches are absent from the result.

    Args:
      rules: ordered `(regex, value)` pairs or a mapping in that order.
      paths: paths of kernels.

    Raises:
      UnmatchedRuleError: a rule matches no path, or is not a regular expression. A rule whose
        paths were all taken by earlier rules counts as matching.

    Example:
      >>> match_rules([(".*/down", 0.25), ("layers/.*", 0.5)],
      ...             ["layers/0/up/kernel", "layers/0/down/kernel", "head/kernel"])
      {'layers/0/up/kernel': 0.5, 'layers/0/down/kernel': 0.25}
    """
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    paths = list(paths)
    compiled = [(_compile(pattern), value) for pattern, value in pairs]
    for pattern, _ in compiled:
        if not any(_matches(pattern, path) for path in paths):
            raise UnmatchedRuleError(_unmatched_message(pattern.pattern, paths))
    result = {}
    for path in paths:
        for pattern, value in compiled:
            if _matches(pattern, path):
                result[path] = value
                break
    return result


def select(where: str | Sequence[str], paths: Iterable[str]) -> list[str]:
    """Paths matched by one regular expression or by any of several, in the order of `paths`.

    Raises:
      UnmatchedRuleError: an expression matches no path.

    Example:
      >>> select("layers/.*", ["embed/embedding", "layers/0/up/kernel"])
      ['layers/0/up/kernel']
    """
    patterns = [where] if isinstance(where, str) else list(where)
    return list(match_rules([(pattern, None) for pattern in patterns], paths))


def _compile(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UnmatchedRuleError(
            f"Rule {pattern!r} is not a regular expression: {error}."
        ) from error


def _matches(pattern: re.Pattern[str], path: str) -> bool:
    return bool(pattern.fullmatch(path) or pattern.fullmatch(path.removesuffix("/kernel")))


def _unmatched_message(rule: str, paths: list[str]) -> str:
    if not paths:
        return f"No kernel matches rule '{rule}': there are no kernels to choose from."
    nearest = difflib.get_close_matches(rule, paths, n=3, cutoff=0.0)
    return (
        f"No kernel matches rule '{rule}'. Nearest paths: {', '.join(nearest)}. Rules are regular "
        "expressions that must match whole paths (the last part '/kernel' may be left out)."
    )
