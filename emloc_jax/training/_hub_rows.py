"""Rows of a Hugging Face data set, through the optional package `datasets`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from emloc_jax.errors import DataError
from emloc_jax.training._rows import Row, read_rows

__all__ = ["hub_records", "read_hub_rows"]


def read_hub_rows(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of the Hugging Face data set `name`.

    Args:
        name: see `hub_records`.
        split: see `hub_records`.
        config: see `hub_records`.
        columns: see `read_rows`.

    Raises:
        DataError: see `hub_records`, or a row is malformed.
    """
    return read_rows(hub_records(name, split=split, config=config), columns=columns)


def hub_records(
    name: str, *, split: str = "train", config: str | None = None
) -> Iterable[Mapping[str, Any]]:
    """The Hugging Face data set `name`, for any of the readers of rows.

    Args:
        name: repository id or local folder, as `datasets.load_dataset` takes it.
        split: split or slice of one (`train[:1000]`).
        config: configuration of the data set, if it has several.

    Raises:
        DataError: `datasets` is not installed, or the data set cannot be loaded.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"data set {name!r} was asked for, but the package 'datasets' is not installed: "
            "pip install datasets, or save the rows as JSONL and give the file."
        ) from error
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # its error classes differ by version and by network library
        raise DataError(f"data set {name!r}, split {split!r}: {error}") from error
