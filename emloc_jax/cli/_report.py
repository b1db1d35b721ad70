"""The closing table of a run, and its JSON."""

import dataclasses
from typing import Any

from rich.table import Table

from emloc_jax._bytes import format_bytes
from emloc_jax.memory import Ledger

__all__ = ["RunReport", "StageRow"]


@dataclasses.dataclass(frozen=True)
class StageRow:
    """One evaluated model.

    Attributes:
      name: what it is.
      parameters: parameters that it holds, adapters included.
      loss: mean over the test's learnt tokens (for a classifier: rows); None without a test set.
      scores: of generated answers, or a classifier's metrics.
    """

    name: str
    parameters: int
    loss: float | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RunReport:
    """What a run did.

    Attributes:
      method: emloc, lora, full or lsp; eval.
      stages: evaluated models.
      facts: measured figures by name; bytes end in `_bytes`, times in `_seconds`.
      ledger: what each stage took; a resumed run has the stages that it went through itself.
    """

    method: str
    stages: list[StageRow] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    ledger: Ledger | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        content = {
            "method": self.method,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "facts": self.facts,
        }
        return content if self.ledger is None else content | {"ledger": self.ledger.to_dict()}

    def tables(self) -> list[Table]:
        """The evaluated models, the ledger, then the figures."""
        names = sorted({name for stage in self.stages for name in stage.scores})
        models = Table(title="Test rows")
        models.add_column("model")
        for name in [*names, "loss", "parameters"]:
            models.add_column(name.replace("_", " "), justify="right")
        for stage in self.stages:
            scores = [f"{100 * stage.scores[n]:.1f} %" if n in stage.scores else "" for n in names]
            loss = "" if stage.loss is None else f"{stage.loss:.4f}"
            models.add_row(stage.name, *scores, loss, f"{stage.parameters:,}")
        figures = Table(title="Figures", show_header=False)
        figures.add_column()
        figures.add_column(justify="right")
        for name, value in self.facts.items():
            figures.add_row(_label(name), _text(name, value))
        parts = [(models, self.stages), (figures, self.facts)]
        if self.ledger is not None:
            parts.insert(1, (self.ledger.table(), self.ledger.rows))
        return [table for table, rows in parts if rows]


def _label(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_seconds"):
        return f"{value:.2f} s"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
