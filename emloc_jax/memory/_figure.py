"""A plan as a picture: the stages as stacked bars, against the line of the budget."""

from pathlib import Path

from emloc_jax._files import new_file
from emloc_jax.errors import ConfigError
from emloc_jax.memory._plan import Budget, Plan

__all__ = ["check_figure", "draw_plan"]

_GIB = 2**30


def check_figure() -> None:
    """Refuses early what cannot be drawn later.

    Raises:
      ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "figure= needs matplotlib, which is not installed (pip install 'emloc_jax[plots]'). "
            "Without figure= the plan is printed, and output= writes it as JSON."
        ) from error


def draw_plan(path: str | Path, plan: Plan, budget: Budget) -> None:
    """Draws the device memory of every stage, part by part.

    Raises:
      ConfigError: matplotlib is missing.
      OutputExistsError: `path` exists.
    """
    check_figure()
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = plan.stages
    sizes: dict[str, int] = {}
    for stage in stages:
        for name, size in stage.parts.items():
            sizes[name] = sizes.get(name, 0) + size
    seen = [name for name in sizes if sizes[name] > 0.001 * sum(sizes.values())]  # slivers hide
    figure = Figure(figsize=(1.1 * len(stages) + 4, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = [s.method if s.name == s.method else f"{s.method}\n{s.name}" for s in stages]
    bottom = [0.0] * len(stages)
    for number, name in enumerate(seen):
        heights = [stage.parts.get(name, 0) / _GIB for stage in stages]
        axes.bar(labels, heights, bottom=bottom, label=name, color=colormaps["tab20"](number))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if budget.device is not None:
        axes.axhline(budget.device / _GIB, color="black", linestyle="--", label="budget")
    axes.set_ylabel("device memory (GiB)")
    axes.set_title(f"{plan.model}, {plan.setting}", fontsize=9)
    axes.legend(fontsize=8)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120)
