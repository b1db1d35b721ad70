"""Instruction data in Alpaca's layout, and code instructions, as prompts with completions."""

from __future__ import annotations

import logging
from typing import Any, Literal

from emloc_jax.errors import DataError
from emloc_jax.training._records import Source, named_records
from emloc_jax.training._rows import Row, as_mapping, to_row

__all__ = ["read_instruction_rows"]

logger = logging.getLogger(__name__)

# The prompts of Stanford Alpaca (Taori et al. 2023), on which most such models were trained.
_ALONE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def read_instruction_rows(
    source: Source, *, format: Literal["alpaca", "code"] = "alpaca"
) -> list[Row]:
    """Rows of instruction data, with Stanford Alpaca's prompts.

    Other prompts are `read_rows` with templates in `columns`.

    Args:
        source: a file or rows, as for `read_rows`.
        format: `'alpaca'` has `instruction`, `output` and, for some rows, a non-empty `input`;
            `'code'` (evol-codealpaca and its kin) has `instruction` and `output` only.

    Returns:
        At least one row. Alpaca's own file has rows with an empty `output`; they are left out, and
        the log says how many.

    Raises:
        DataError: no row, or one whose fields are missing or no text (the message names it).

    Example:
        >>> (row,) = read_instruction_rows(
        ...     [{"instruction": "Add them.", "input": "1, 2", "output": "3"}]
        ... )
        >>> print(row.prompt[row.prompt.index("###") :], row.completion)
        ### Instruction:
        Add them.
        <BLANKLINE>
        ### Input:
        1, 2
        <BLANKLINE>
        ### Response: 3
    """
    records, name = named_records(source)
    rows, empty = [], []
    for origin, record in records:
        fields = _fields(origin, record, format)
        prompt = _WITH_INPUT if fields.get("input") else _ALONE
        if not fields["output"].strip():
            empty.append(origin)
            continue
        rows.append(to_row(origin, fields, {"prompt": prompt, "completion": "output"}))
    if not rows:
        raise DataError(f"{name}: no row with an answer found; at least one is needed.")
    if empty:
        logger.warning(
            "%s: %d rows left out, for their output is empty: %s%s.",
            name, len(empty), ", ".join(empty[:5]), ", …" if len(empty) > 5 else "",
        )  # fmt: skip
    logger.info("%s: %d rows", name, len(rows))
    return rows


def _fields(origin: str, record: Any, format: str) -> dict[str, str]:
    record = as_mapping(origin, record)
    names = ("instruction", "output")
    fields = {name: record.get(name) for name in names}
    if format == "alpaca":
        fields["input"] = record.get("input") or ""
    for name, value in fields.items():
        if not isinstance(value, str) or (name == "instruction" and not value.strip()):
            raise DataError(
                f"{origin}: {format} rows need a text as {name!r}, found {value!r:.60}; the row "
                f"has the fields {sorted(map(str, record))}. Map other names with columns."
            )
    return {name: value for name, value in fields.items() if isinstance(value, str)}
