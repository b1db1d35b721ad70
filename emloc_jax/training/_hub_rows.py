"""Rows of a Hugging Face data set, through the optional package `datasets`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from emloc_jax.errors import DataError
from emloc_jax.training._rows import Row, read_rows

__all__ = ["read_hub_rows"]


def read_hub_rows(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of the Hugging Face data set `name`.

    Args:
        name: repository id or local folder, as `datasets.load_dataset` takes it.
        split: split or slice of one (`train[:1000]`).
        config: configuration of the data set, if it has several.
        columns: see `read_rows`.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or a row of it is
            malformed.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"data set {name!r} was asked for, but the package 'datasets' is not installed: "
            "pip install datasets, or save the rows as JSONL and give the file."
        ) from error
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # its error classes differ by version and by network library
        raise DataError(f"data set {name!r}, split {split!r}: {error}") from error
    return read_rows(loaded, columns=columns)
