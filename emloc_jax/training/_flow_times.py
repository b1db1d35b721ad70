"""Times of flow matching: how they are drawn for training, and spread for sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from emloc_jax.errors import ConfigError

__all__ = ["TimeSampling", "draw_times", "resolution_shift", "sampling_times", "shift_times"]

TimeSampling = Literal["uniform", "logit_normal", "stratified"]


def draw_times(
    count: int,
    *,
    seed: int | Sequence[int],
    sampling: TimeSampling = "logit_normal",
    shift: float = 1.0,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> np.ndarray:
    """Times in (0, 1), 0 for a clean picture and 1 for pure noise.

    Args:
        count: how many.
        seed: a number or several; the same ones give the same times.
        sampling: `uniform`; `logit_normal`, the sigmoid of a normal number, which favours the
            middle (Esser et al. 2024, arXiv 2403.03206); or `stratified`, one uniform time from
            each of `count` equal stretches, in random order.
        shift: see `shift_times`.
        mean: of the normal number.
        deviation: of the normal number.

    Returns:
        (count,) fp32.

    Raises:
        ConfigError: an unknown sampling, or a shift or deviation that is not positive.

    Example:
        >>> times = draw_times(4, seed=0, sampling="stratified")
        >>> sorted((4 * times).astype(int).tolist())
        [0, 1, 2, 3]
    """
    if sampling not in get_args(TimeSampling) or not deviation > 0:
        raise ConfigError(
            f"sampling={sampling!r} with deviation={deviation} was asked for; sampling is one of "
            f"{', '.join(get_args(TimeSampling))}, and the deviation positive."
        )
    rng = np.random.default_rng(seed)
    if sampling == "logit_normal":
        times = 0.5 + 0.5 * np.tanh(rng.normal(mean, deviation, count) / 2)  # the sigmoid
    else:
        times = rng.uniform(size=count)
    if sampling == "stratified":
        times = (rng.permutation(count) + times) / count
    edge = np.finfo(np.float32).eps  # fp32 must not round to the ends, where nothing is learnt
    return np.clip(shift_times(times, shift), edge, 1 - edge).astype(np.float32)


def shift_times(times: np.ndarray, shift: float) -> np.ndarray:
    """`shift · t / (1 + (shift - 1) · t)`: above 1 it moves times towards noise.

    Larger pictures need more noise before they are as unrecognisable (arXiv 2403.03206, 5.3.2).

    Args:
        times: in [0, 1].
        shift: positive; 1 changes nothing.

    Raises:
        ConfigError: `shift` is not positive.

    Example:
        >>> shift_times(np.array([0.0, 0.5, 1.0]), 3.0).tolist()
        [0.0, 0.75, 1.0]
    """
    if not shift > 0:
        raise ConfigError(f"shift is {shift}; it must be positive (1 changes nothing).")
    return shift * times / (1 + (shift - 1) * times)


def resolution_shift(tokens: int) -> float:
    """FLUX.1-dev's shift for pictures of so many tokens.

    Its logarithm is linear, 0.5 at 256 tokens and 1.15 at 4096.

    Args:
        tokens: T, packed (a picture of 1024 by 1024 pixels has 4096).

    Example:
        >>> round(resolution_shift(256), 4), round(resolution_shift(4096), 4)
        (1.6487, 3.1582)
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (tokens - 256))


def sampling_times(steps: int, shift: float = 1.0) -> np.ndarray:
    """Times from 1 to 0 for a sampler of so many steps.

    Args:
        steps: at least 1.
        shift: see `shift_times`; `resolution_shift(T)` for FLUX.1-dev.

    Returns:
        (steps + 1,) fp32.

    Raises:
        ConfigError: `steps` or `shift` is not positive.

    Example:
        >>> sampling_times(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}; a sampler takes at least 1.")
    return shift_times(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)
