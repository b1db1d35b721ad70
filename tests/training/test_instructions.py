"""Alpaca's files and code instructions become prompts and completions."""

import json
import logging

import pytest

from emloc_jax.errors import DataError
from emloc_jax.training import read_instruction_rows, read_rows

START = "Below is an instruction that describes a task"
ALONE = f"{START}. Write a response that appropriately completes the request."
PAIRED = (
    f"{START}, paired with an input that provides further context. Write a response that "
    "appropriately completes the request."
)
ROWS = [
    {"instruction": "Add {1, 2}.", "input": "", "output": "{3}"},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Greet.", "output": "Hi!"},
]


def test_alpaca_s_own_file(tmp_path, caplog):
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(ROWS, indent=1))
    with caplog.at_level(logging.WARNING):
        rows = read_instruction_rows(path)
    assert [(row.prompt, row.completion) for row in rows] == [
        (f"{ALONE}\n\n### Instruction:\nAdd {{1, 2}}.\n\n### Response:", "{3}"),
        (f"{PAIRED}\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:", "3"),
        (f"{ALONE}\n\n### Instruction:\nGreet.\n\n### Response:", "Hi!"),
    ]
    assert [row.origin for row in rows] == [f"{path}:{line}" for line in (2, 7, 17)]
    assert "1 rows left out" in caplog.text and f"{path}:12" in caplog.text


def test_code_instructions_have_no_input(tmp_path):
    path = tmp_path / "evol.jsonl"
    path.write_text(json.dumps({"instruction": "Sort it.", "output": "sorted(x)"}) + "\n")
    (row,) = read_instruction_rows(path, format="code")
    assert row.prompt == f"{ALONE}\n\n### Instruction:\nSort it.\n\n### Response:"
    columns = {"prompt": ALONE + "\n\n### Instruction:\n{instruction}\n\n### Response:"}
    assert read_rows(path, columns=columns | {"completion": "output"}) == [row]


@pytest.mark.parametrize(
    "format, line, words",
    [
        ("alpaca", '{"instruction": "a", "input": "b"}', "alpaca rows need a text as 'output'"),
        ("alpaca", '{"instruction": "a", "input": 3, "output": "c"}', "as 'input', found 3"),
        ("alpaca", '{"instruction": " ", "output": "c"}', "as 'instruction'"),
        ("code", '{"prompt": "a", "output": "c"}', "'instruction', found None"),
        ("code", "[1]", "named fields"),
    ],
)
def test_malformed_rows_are_refused_with_their_line(tmp_path, format, line, words):
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "a", "input": "", "output": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=f"d.jsonl:2: .*{words}"):
        read_instruction_rows(path, format=format)


def test_a_file_without_answers(tmp_path):
    with pytest.raises(DataError, match="no row with an answer"):
        read_instruction_rows([ROWS[2]])
