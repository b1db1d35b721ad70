"""Metrics of predicted labels and numbers, by name: GLUE's, from scikit-learn and SciPy."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emloc_jax.errors import ConfigError

__all__ = ["check_label_metrics", "label_metrics"]

# (predictions (N,), labels (N,)) to a number.
Metric = Callable[[np.ndarray, np.ndarray], float]


def label_metrics(
    names: Sequence[str], predictions: np.ndarray, labels: np.ndarray, *, positive: int = 1
) -> dict[str, float]:
    """Metrics of predictions.

    Args:
        names: `accuracy`, `f1` (of one class of two), `matthews`; for numbers `pearson` and
            `spearman`.
        predictions: (N,) numbers of classes, or predicted numbers.
        labels: (N,) the true ones.
        positive: the class that `f1` is of.

    Returns:
        Name to value. Pearson's and Spearman's correlation with a constant is NaN, Matthews' is 0.

    Raises:
        ConfigError: a name that is none of these, or a package is missing.

    Example:
        >>> label_metrics(["accuracy"], np.array([0, 1, 1]), np.array([0, 1, 2]))
        {'accuracy': 0.6666666666666666}
    """
    for name in names:
        if name not in _METRICS:
            raise ConfigError(
                f"The metric {name!r} was asked for; there are {', '.join(_METRICS)}."
            )
    values = {}
    for name in names:
        pair = (predictions, labels)
        if name == "f1":
            pair = (predictions == positive, labels == positive)
        values[name] = _METRICS[name](*pair)
    return values


def check_label_metrics(names: Sequence[str], classes: int) -> None:
    """Refuses metrics that do not exist, do not fit, or lack their package.

    Args:
        names: see `label_metrics`.
        classes: number of classes; 0 if numbers are predicted.

    Raises:
        ConfigError: one of them.
    """
    allowed = ["pearson", "spearman"]
    if classes:
        allowed = ["accuracy", "matthews"] + (["f1"] if classes == 2 else [])
    for name in names:
        if name not in allowed:
            what = f"{classes} classes" if classes else "predicted numbers"
            raise ConfigError(
                f"The metric {name!r} was asked for; with {what} there are {', '.join(allowed)}."
            )
    if set(names) & {"f1", "matthews"}:
        _sklearn()


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(_sklearn().f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    sklearn = _sklearn()
    if min(np.ptp(predictions), np.ptp(labels)) == 0:
        return 0.0  # as scikit-learn has it, which warns besides if both are constant
    return float(sklearn.matthews_corrcoef(labels, predictions))


def _correlation(function: str) -> Metric:
    def correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
        if min(np.ptp(predictions), np.ptp(labels)) == 0:
            return math.nan
        stats = importlib.import_module("scipy.stats")  # slow to import
        return float(getattr(stats, function)(predictions, labels).statistic)

    return correlation


def _sklearn() -> Any:
    try:
        return importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise ConfigError(
            "The metrics f1 and matthews need scikit-learn: pip install 'emloc_jax[glue]', or ask "
            "for others with eval.scores."
        ) from error


_METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
