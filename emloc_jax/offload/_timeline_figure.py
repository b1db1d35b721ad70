"""A picture of the four lanes."""

import os
from collections.abc import Sequence

import numpy as np

from emloc_jax._files import check_new, new_file
from emloc_jax.errors import ConfigError, DataError
from emloc_jax.offload._timeline import LANES, Span, Timeline

__all__ = ["draw_timeline"]

_ROWS = {
    "device": "device",
    "d2h": "device → host",
    "host": "host update",
    "h2d": "host → device",
}
# The kind of device work is told by the height of the bar; the block by its colour.
_HEIGHTS = {"forward": 0.5, "apply": 0.25, "update": 0.25}


def draw_timeline(
    timeline: Timeline,
    path: str | os.PathLike,
    *,
    steps: Sequence[int] | None = None,
    seconds: float | None = None,
    title: str = "",
    overwrite: bool = False,
) -> None:
    """Draws the lanes as rows of bars, one bar per span, coloured by block.

    The picture begins with the first chosen step and ends where the step after the last one
    begins, or after so many seconds; all that ran meanwhile is shown, whatever step it belongs to.
    On the device lane a forward pass is a bar of half height, an update or its application of
    quarter height, and all other work of full height; what lies outside the blocks is grey. A
    dashed line marks where a step begins.

    Args:
      timeline: what to draw.
      path: of the PNG.
      steps: the steps to draw, in a row; all by default. One or two can be read.
      seconds: length of the picture, so that several can be compared.
      title: above the picture.
      overwrite: replace an existing file.

    Raises:
      ConfigError: matplotlib is missing, or `seconds` is not positive.
      DataError: the device did nothing in these steps.
      OutputExistsError: `path` exists and `overwrite` is false.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "A picture of the lanes was asked for, and matplotlib is not installed: "
            "pip install 'emloc_jax[plots]'."
        ) from error
    check_new(path, overwrite)
    zero, end, begins = _window(timeline.spans, steps)
    if seconds is not None:
        if not seconds > 0:
            raise ConfigError(f"A picture of {seconds} seconds was asked for; give more than 0.")
        end = zero + seconds
    spans = [s for s in timeline.spans if s.end > zero and s.start < end]

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unit, per_second = _unit(end - zero)
    last = max(1, *(s.block for s in spans if not _outside(s)))
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for row, lane in enumerate(LANES):
        own = [s for s in spans if s.lane == lane]
        heights = [_height(s) for s in own]
        left = [max(s.start - zero, 0.0) for s in own]
        widths = [min(s.end, end) - zero - start for s, start in zip(own, left, strict=True)]
        axes.barh(
            [row + 0.4 - height / 2 for height in heights],
            [width * per_second for width in widths],
            left=[start * per_second for start in left],
            height=heights,
            color=["0.7" if _outside(s) else colours(s.block / last) for s in own],
            edgecolor="white",
            # A line around a bar narrower than itself would hide it.
            linewidth=[0.3 if width > 0.003 * (end - zero) else 0.0 for width in widths],
        )
    for begin in (b for b in begins if zero < b < end):
        axes.axvline((begin - zero) * per_second, color="0.3", linewidth=0.8, linestyle="--")
    axes.set_yticks(np.arange(len(LANES)), [_ROWS[lane] for lane in LANES])
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.set_xlim(0, (end - zero) * per_second)
    axes.set_xlabel(f"time ({unit}); device: half height forward, full backward, quarter apply")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _add_colour_bar(figure, axes, colours, last)
    with new_file(path, overwrite=overwrite) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _add_colour_bar(figure, axes, colours, last: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, last), colours), ax=axes, pad=0.01)
    bar.set_label("block")
    bar.set_ticks(sorted({0, last // 2, last}))


def _outside(span: Span) -> bool:
    """Whether it belongs to no block; those are grey."""
    return span.block < 0 or span.name in ("embed", "head")


def _height(span: Span) -> float:
    return 0.8 * (_HEIGHTS.get(span.name, 1.0) if span.lane == "device" else 1.0)


def _window(spans: Sequence[Span], steps: Sequence[int] | None) -> tuple[float, float, list[float]]:
    """Start and end of the chosen steps, and where they and later ones begin."""
    begins: dict[int, float] = {}
    for span in spans:
        if span.lane == "device":
            begins[span.step] = min(span.start, begins.get(span.step, span.start))
    chosen = sorted(begin for step, begin in begins.items() if steps is None or step in steps)
    if not chosen:
        wanted = "any step" if steps is None else f"the steps {list(steps)}"
        raise DataError(f"The timeline has no device work of {wanted}. Record it before drawing.")
    later = [begin for begin in begins.values() if begin > chosen[-1]]
    end = min(later, default=max(s.end for s in spans))
    return chosen[0], end, sorted(b for b in begins.values() if b >= chosen[0])


def _unit(seconds: float) -> tuple[str, float]:
    return ("s", 1.0) if seconds >= 10 else ("ms", 1e3) if seconds >= 0.01 else ("µs", 1e6)
