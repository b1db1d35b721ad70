"""The largest setting that fits, by compiling few."""

from collections.abc import Callable, Sequence

from emloc_jax.errors import ConfigError
from emloc_jax.memory._methods import StageMaker, stages_of
from emloc_jax.memory._plan import Budget, Planner
from emloc_jax.memory._setting import Setting

__all__ = ["KNOBS", "Knob", "largest", "largest_index"]

# From a setting and a position to the setting there; memory grows with the position.
Knob = Callable[[Setting, int], Setting]

_MOST = 2**20
_TOKENS = 64  # step of lengths
_CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def _ratio(setting: Setting, index: int) -> Setting:
    return setting.replace(ratio=round(index / 100, 2))


def _batch_size(setting: Setting, index: int) -> Setting:
    return setting.replace(batch_size=index * setting.accumulation)


def _length(setting: Setting, index: int) -> Setting:
    return setting.replace(length=_TOKENS * index)


def _chunk(setting: Setting, index: int) -> Setting:
    return setting.replace(chunk=_CHUNKS[index - 1])


KNOBS: dict[str, Knob] = {
    "ratio": _ratio,
    "batch_size": _batch_size,
    "length": _length,
    "chunk": _chunk,
}


def largest(
    planner: Planner,
    methods: Sequence[str],
    setting: Setting,
    budget: Budget,
    knob: str,
    *,
    most: int | None = None,
) -> Setting | None:
    """The setting with the largest value of one knob that fits, all else as it is.

    What is returned was compiled, in every stage, and fits; the next larger value was compiled in
    the stage that does not fit there (unless there is no larger one).

    Args:
      planner: of the model and the device.
      methods: whose stages must fit.
      setting: with any value of the knob.
      budget: bytes allowed.
      knob: `ratio` in steps of 0.01, `batch_size` in rows per micro-batch, `length` in steps of 64
        tokens, or `chunk` in powers of two.
      most: largest value to try of `batch_size` or `length`; a length also ends where the model
        does.

    Returns:
      None if not even the smallest value fits.

    Raises:
      ConfigError: an unknown knob, or a budget without a limit.
    """
    if knob not in KNOBS:
        raise ConfigError(f"'{knob}' cannot be searched; known are {', '.join(KNOBS)}.")
    if budget.device is None and budget.host is None:
        raise ConfigError("A search needs a budget: give the device's memory, or the host's.")
    move = KNOBS[knob]
    limit = _limit(planner, setting, knob, most)

    def excess(maker: StageMaker) -> Callable[[int], int]:
        return lambda index: max(
            (
                budget.excess(device=stage.device, host=sum(stage.host.values()))
                for stage in planner.stages(maker, move(setting, index))
            ),
            default=-1,  # a stage that this run does not have
        )

    makers = [maker for method in methods for maker in stages_of(method)]
    makers = [maker for maker in makers if planner.stages(maker, move(setting, 1))]
    by_size = sorted(makers, key=lambda maker: -excess(maker)(1))
    for number, maker in enumerate(by_size):  # what needs most decides, the others are asked once
        ask_last = number > 0 or knob == "chunk"
        index = largest_index(excess(maker), limit, guess=limit if ask_last else None)
        if index is None:
            return None
        limit = index
    return move(setting, limit)


def _limit(planner: Planner, setting: Setting, knob: str, most: int | None) -> int:
    """The last position of a knob that makes a difference."""
    kind = planner.abstract.kind
    match knob:
        case "ratio":
            return 99
        case "chunk":
            tokens = setting.micro_batch * (setting.length + kind.image_tokens(setting))
            return 1 + next((i for i, c in enumerate(_CHUNKS) if c >= tokens), len(_CHUNKS) - 1)
        case "batch_size":
            return _MOST if most is None else most
        case _:
            known = kind.most_text(setting)
            ends = [size for size in (most, known, _MOST) if size is not None]
            return max(1, min(ends) // _TOKENS)


def largest_index(
    excess: Callable[[int], int], limit: int, *, guess: int | None = None
) -> int | None:
    """The largest index from 1 to `limit` whose excess is at most 0; None if there is none.

    Excesses must not fall with the index. They are nearly straight lines, so that a secant finds
    the place in a few steps; halving the interval in between keeps that true of any line.

    Args:
      excess: of an index.
      limit: the largest index.
      guess: an index to ask first; if it is the limit and fits, nothing else is asked.

    Example:
      >>> asked = []
      >>> largest_index(lambda i: asked.append(i) or 7 * i - 1000, 10**6), len(asked) < 10
      (142, True)
    """
    if guess == limit and excess(limit) <= 0:
        return limit
    first = excess(1)
    if first > 0:
        return None
    low, low_excess = 1, first
    high, step = None, 1
    while high is None:  # as far as it takes, in growing steps
        if low == limit:
            return low
        index = min(limit, low + step)
        found = excess(index)
        if found > 0:
            high, high_excess = index, found
        else:
            slope = (found - low_excess) / (index - low)
            step = max(2 * step, int(-found / slope * 1.05) + 1) if slope > 0 else 4 * step
            low, low_excess = index, found
    by_secant = True
    while high - low > 1:
        index = (low + high) // 2
        if by_secant:
            share = -low_excess / (high_excess - low_excess)
            index = low + int(share * (high - low))
        index = min(max(index, low + 1), high - 1)
        found, width = excess(index), high - low
        if found > 0:
            high, high_excess = index, found
        else:
            low, low_excess = index, found
        # A secant that keeps one end halves too little; try the neighbour of what was found.
        by_secant = not by_secant or high - low < width / 2
    return low
