"""Which rows the data options ask for, and reading them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from emloc_jax.cli._options import DataOptions
from emloc_jax.errors import ConfigError
from emloc_jax.training import (
    GLUE_TASKS,
    ImageRow,
    LabelledRow,
    Row,
    hub_records,
    read_glue_rows,
    read_image_folder,
    read_image_rows,
    read_instruction_rows,
    read_labelled_rows,
    read_rows,
)

__all__ = ["RowSource", "Rows", "glue_name", "read_source"]

RowSource = str | PathLike[str] | Iterable[Mapping[str, Any]]
Rows = Sequence[Row] | Sequence[LabelledRow] | Sequence[ImageRow]


def read_source(source: RowSource, options: DataOptions, *, first: int | None = None) -> Rows:
    """Reads rows to continue, or rows to classify, as `data.format` or `data.columns` says.

    Args:
      source: a path, `hub:NAME` or `hub:NAME:SPLIT`, or rows; a folder holds images to classify.
      options: format and columns.
      first: use only so many rows.

    Raises:
      ConfigError: a format that does not exist, or one besides columns.
      DataError: see the readers.
    """
    read = _reader(options)
    if isinstance(source, str) and source.startswith("hub:"):
        name, _, split = source.removeprefix("hub:").partition(":")
        # The benchmark's own data set has a configuration per task.
        config = glue_name(options) if name.split("/")[-1] == "glue" else None
        source = hub_records(name, split=split or "train", config=config)
    if isinstance(source, str | PathLike) and Path(source).is_dir():
        return read_image_folder(source)[:first]
    return read(source)[:first]


def glue_name(options: DataOptions) -> str | None:
    """The GLUE task that `data.format` names, or None."""
    kind, _, task = (options.format or "").partition("/")
    return task if kind == "glue" else None


def _reader(options: DataOptions) -> Callable[[Any], Rows]:
    task, columns = glue_name(options), options.columns
    if options.format is not None and columns is not None:
        raise ConfigError(
            f"data.format={options.format} and data.columns were both given; a format knows its "
            "columns, so give one of them."
        )
    if task is not None and task in GLUE_TASKS:
        return lambda source: read_glue_rows(source, task)
    if options.format in ("alpaca", "code"):
        kind: Any = options.format
        return lambda source: read_instruction_rows(source, format=kind)
    if options.format is not None:
        raise ConfigError(
            f"data.format={options.format} does not exist; there are alpaca, code, and glue/TASK "
            f"with TASK one of {', '.join(GLUE_TASKS)}."
        )
    if columns is not None and {"image", "label"} <= set(columns):
        return lambda source: read_image_rows(source, columns=columns)
    if columns is not None and set(columns) & {"text", "text_pair", "label"}:
        return lambda source: read_labelled_rows(source, columns=columns)
    return lambda source: read_rows(source, columns=columns)
