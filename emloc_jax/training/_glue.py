"""The nine tasks of GLUE: their columns, labels and metrics, and readers of their files."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._labelled_rows import LabelledRow, text_of
from emloc_jax.training._records import Source, named_records, read_tsv
from emloc_jax.training._rows import as_mapping

__all__ = ["GLUE_TASKS", "GlueTask", "glue_task", "read_glue_rows"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GlueTask:
    """One task (Wang et al. 2018, arXiv 1804.07461).

    Attributes:
        name: as `data.format=glue/NAME` says it.
        texts: columns of the text, or of the two texts, as Hugging Face names them.
        labels: names of the classes, in the order of their numbers; empty: a score is predicted.
        metrics: what GLUE reports.
        tsv: names of columns in the official files where they differ, `label` among them.
        header: columns of an official file that does not name them.
        broken_lines: the official file has lines with another number of cells; they are left out.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    tsv: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] | None = None
    broken_lines: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_TASKS = (
    GlueTask(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews",),
        header=("source", "label", "mark", "sentence"),
    ),
    GlueTask("sst2", ("sentence",), ("negative", "positive")),
    GlueTask(
        "mrpc",
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        tsv={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    GlueTask(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        tsv={"label": "is_duplicate"},
        broken_lines=True,
    ),
    GlueTask("stsb", _PAIR, (), ("pearson", "spearman"), tsv={"label": "score"}),
    GlueTask(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        tsv={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
    GlueTask("qnli", ("question", "sentence"), _ENTAILMENT),
    GlueTask("rte", _PAIR, _ENTAILMENT),
    GlueTask("wnli", _PAIR, ("not_entailment", "entailment")),
)
GLUE_TASKS = tuple(task.name for task in _TASKS)


def glue_task(name: str) -> GlueTask:
    """The task of that name.

    Raises:
        ConfigError: there is none.

    Example:
        >>> glue_task("mrpc").metrics
        ('accuracy', 'f1')
    """
    for task in _TASKS:
        if task.name == name:
            return task
    raise ConfigError(f"GLUE has no task {name!r}; it has {', '.join(GLUE_TASKS)}.")


def read_glue_rows(source: Source, task: str) -> list[LabelledRow]:
    """Rows of a GLUE task.

    Args:
        source: an official file (`train.tsv`, `dev.tsv`, `dev_matched.tsv`, …), or a JSONL, JSON
            or CSV file or an iterable of mappings with Hugging Face's columns, whose `label` is a
            number or a name.
        task: `cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte` or `wnli`.

    Returns:
        At least one row, the label by its name (STS-B: a score from 0 to 5).

    Raises:
        DataError: no row, or a malformed or unlabelled one (the message names file and line).
        ConfigError: no such task.

    Example:
        >>> row = {"sentence1": "It rained.", "sentence2": "It was dry.", "label": 1}
        >>> read_glue_rows([row], "rte")[0].label
        'not_entailment'
    """
    spec = glue_task(task)
    broken: list[str] = []
    names = {column: column for column in (*spec.texts, "label")}
    if isinstance(source, str | PathLike) and Path(source).suffix.lower() == ".tsv":
        names |= spec.tsv
        on_broken = broken.append if spec.broken_lines else None
        name, records = str(source), read_tsv(source, header=spec.header, on_broken=on_broken)
    else:
        records, name = named_records(source)
    rows = [_row(spec, origin, record, names) for origin, record in records]
    if not rows:
        raise DataError(f"{name}: no row found; at least one is needed.")
    if broken:
        logger.warning("%d broken lines left out; the first is %s", len(broken), broken[0])
    logger.info("%s: %d rows", name, len(rows))
    return rows


def _row(task: GlueTask, origin: str, record: Any, names: Mapping[str, str]) -> LabelledRow:
    record = as_mapping(origin, record)
    missing = [name for name in names.values() if record.get(name) is None]
    if missing:
        raise DataError(
            f"{origin}: a row of GLUE's {task.name} has {', '.join(names.values())}; "
            f"{', '.join(missing)} is missing among {', '.join(map(str, record))}. Check the "
            "task's name, and that the file is one with labels."
        )
    texts = [text_of(origin, record, names[column]) for column in task.texts]
    label = _label(task, origin, record[names["label"]])
    return LabelledRow(origin, texts[0], texts[1] if len(texts) > 1 else None, label)


def _label(task: GlueTask, origin: str, value: Any) -> str | float:
    if task.labels:
        if value in task.labels:
            return value
        numbers = {str(number): name for number, name in enumerate(task.labels)}
        if str(value) in numbers:
            return numbers[str(value)]
        wanted = " or ".join(f"{name} ({number})" for number, name in numbers.items())
    else:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if 0 <= score <= 5:
            return score
        wanted = "a score from 0 to 5"
    raise DataError(
        f"{origin}: the label is {value!r:.40}; {task.name} has {wanted}. Rows of a test set have "
        "no labels and can be neither learnt nor scored."
    )
