"""A picture of the loss curves of a run."""

from pathlib import Path

from emloc_jax._files import new_file
from emloc_jax.cli._console import say
from emloc_jax.training import read_metrics

__all__ = ["draw_curves"]


def draw_curves(folder: Path) -> None:
    """Draws `metrics.jsonl` of a run folder as `curves.png`; says so when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say("No picture of the loss curves: install matplotlib (pip install 'emloc_jax[plots]').")
        return
    records = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label in (("loss", "training loss"), ("test_loss", "test loss")):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if len(points) < 9 else None
            )
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss per learnt token, or per row")
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(folder / "curves.png", overwrite=True) as partial:
        figure.savefig(partial, dpi=120)
