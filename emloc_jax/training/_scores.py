"""Scores of a generated text against its reference, by name."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from decimal import Decimal

from emloc_jax.errors import ConfigError, DataError

__all__ = ["Score", "exact_match", "json_equal", "last_number", "register_score", "score_named"]

Score = Callable[[str, str], float]

_SCORES: dict[str, Score] = {}
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")


def register_score(name: str) -> Callable[[Score], Score]:
    """Registers `score(prediction, reference) -> float` under `name`.

    Raises:
        ConfigError: the name is taken.

    Example:
        >>> @register_score("starts_alike")
        ... def starts_alike(prediction, reference):
        ...     return float(prediction[:1] == reference[:1])
        >>> score_named("starts_alike")("yes", "yea")
        1.0
    """
    if name in _SCORES:
        raise ConfigError(f"a score named {name!r} exists already; take another name.")

    def register(score: Score) -> Score:
        _SCORES[name] = score
        return score

    return register


def score_named(name: str) -> Score:
    """The registered score `name`, or the function that `module:function` names.

    Raises:
        ConfigError: there is no such score.
    """
    if name in _SCORES:
        return _SCORES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"no score is named {name!r}; there are {', '.join(sorted(_SCORES))}, and any "
            "'module:function' that takes a prediction and a reference."
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"score {name!r} cannot be imported ({error}).") from error


@register_score("exact_match")
def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal but for white space around them.

    Example:
        >>> exact_match(" Paris\\n", "Paris")
        1.0
    """
    return float(prediction.strip() == reference.strip())


@register_score("last_number")
def last_number(prediction: str, reference: str) -> float:
    """1 if the last numbers in both texts are equal, as GSM8K is scored.

    Raises:
        DataError: the reference has no number.

    Example:
        >>> last_number("so she pays $1,200.00.", "… #### 1200")
        1.0
    """
    wanted = _last_number(reference)
    if wanted is None:
        raise DataError(f"last_number: the reference has no number: {reference!r:.80}.")
    return float(_last_number(prediction) == wanted)


@register_score("json_equal")
def json_equal(prediction: str, reference: str) -> float:
    """1 if both texts are JSON of equal value: key order and layout do not matter.

    Raises:
        DataError: the reference is not JSON.

    Example:
        >>> json_equal('{"b": 2, "a": 1}', '{"a":1,"b":2}'), json_equal("no JSON", "{}")
        (1.0, 0.0)
    """
    try:
        wanted = json.loads(reference)
    except ValueError as error:
        raise DataError(
            f"json_equal: the reference is not JSON ({error}): {reference!r:.80}."
        ) from error
    try:
        found = json.loads(prediction)
    except (ValueError, RecursionError):
        return 0.0
    # Through text, for Python says 1 == True.
    return float(json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True))


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
