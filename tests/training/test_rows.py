"""Rows from files and memory: right when well formed, refused with file and line when not."""

import json
import sys
import types

import pytest

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training import read_hub_rows, read_rows

PAIR = {"prompt": "p", "completion": "c"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl_counts_blank_lines_and_keeps_unicode_separators(tmp_path):
    text = '{"prompt": "a\u2028b", "completion": "1"}\r\n\n' + json.dumps(PAIR) + "\n"
    path = write(tmp_path, "d.jsonl", "\ufeff" + text)
    rows = read_rows(path)
    assert [(r.prompt, r.completion) for r in rows] == [("a\u2028b", "1"), ("p", "c")]
    assert [r.origin for r in rows] == [f"{path}:1", f"{path}:3"]


def test_json_list_knows_lines(tmp_path):
    chat = json.dumps({"messages": CHAT})
    path = write(tmp_path, "d.json", '[\n {"prompt":"p",\n"completion":"c"},\n\n' + chat + "]\n")
    rows = read_rows(path)
    assert [r.origin for r in rows] == [f"{path}:2", f"{path}:5"]
    assert rows[1].messages == tuple(CHAT) and rows[1].reference == "yo"


def test_csv_with_cells_over_several_lines(tmp_path):
    path = write(tmp_path, "d.csv", 'mr,ref,other\n"a, b","line 1\nline 2",x\n"say ""hi""",z,y\n')
    rows = read_rows(path, columns={"prompt": "mr", "completion": "ref"})
    assert [(r.prompt, r.completion) for r in rows] == [
        ("a, b", "line 1\nline 2"),
        ('say "hi"', "z"),
    ]
    assert [r.origin for r in rows] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    "name, text, where, what",
    [
        ("d.jsonl", '{"prompt": "p", "completion": "c"}\n{"prompt": \n', ":2:", "not a JSON"),
        ("d.jsonl", '\n["p", "c"]\n', ":2:", "an object"),
        ("d.jsonl", '{"prompt": "p"}\n', ":1:", "completion"),
        ("d.jsonl", '{"prompt": "p", "completion": 3}', ":1:", "must be text, found int"),
        ("d.jsonl", '{"prompt": "p", "completion": " "}', ":1:", "empty"),
        ("d.jsonl", '{"prompt": null, "completion": "c"}', ":1:", "cannot be filled"),
        ("d.jsonl", b'{"prompt": "p", "completion": "c"}\n\xff\n', ":2:", "UTF-8"),
        ("d.jsonl", '{"messages": []}', ":1:", "list of turns"),
        ("d.jsonl", '{"messages": [{"role": "user"}]}', ":1:", "turn 1"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', ":1:", "no assistant"),
        ("d.jsonl", "\n", "", "no row"),
        ("d.json", '{"prompt": "p"}', ":1:", "one list"),
        ("d.json", '[{"prompt": "p", "completion": "c"},\n{]', ":2:", "not valid JSON"),
        ("d.json", '[{"prompt": "p", "completion": "c"}\n', ":2:", "goes on neither"),
        ("d.json", '[{"prompt": "p", "completion": "c"}]\n\n x', ":3:", "follows"),
        ("d.json", '[{"prompt": "p", "completion": "c"},\n\n 7]', ":3:", "an object"),
        ("d.json", "[]", "", "no row"),
        ("d.csv", "prompt,completion\na,b\n\nc\n", ":4:", "1 cells"),
        ("d.csv", 'prompt,completion\na,"b\n', ":2:", "not valid CSV"),
        ("d.csv", "prompt,prompt\n", ":1:", "twice"),
        ("d.txt", "x", "", "jsonl"),
    ],
)
def test_malformed_files_are_refused_with_their_line(tmp_path, name, text, where, what):
    path = write(tmp_path, name, text)
    with pytest.raises(DataError) as info:
        read_rows(path)
    assert str(path) + where in str(info.value) and what in str(info.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_columns_map_and_fill_templates():
    record = {"text": "hello", "category": "greeting", "n": 3, "none": None}
    columns = {"prompt": "{n}: {text} ->", "completion": "category"}
    (row,) = read_rows([record], columns=columns)
    assert (row.prompt, row.completion, row.reference) == ("3: hello ->", "greeting", "greeting")
    with pytest.raises(DataError, match=r"row 1.*'\{none\}'.*fills the fields"):
        read_rows([record], columns={"prompt": "{none}", "completion": "category"})
    for wrong in ({"prompt": "text"}, {"prompts": "text"}, {"messages": "a", "prompt": "b"}):
        with pytest.raises(ConfigError, match="'completion'"):
            read_rows([record], columns=wrong)


def test_a_row_with_both_forms_needs_a_choice():
    both = PAIR | {"messages": CHAT}
    with pytest.raises(DataError, match="row 1.*columns"):
        read_rows([both])
    assert read_rows([both], columns={"messages": "messages"})[0].messages
    assert read_rows([{"prompt": "p", "messages": CHAT}])[0].messages  # no completion: no doubt


def test_hub_rows_without_and_with_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_hub_rows("some/set")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return iter([PAIR])

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_hub_rows("some/set", split="test")[0].prompt == "p"
    assert asked == [("some/set", None, "test")]
    monkeypatch.setattr(fake, "load_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(DataError, match="some/set.*division"):
        read_hub_rows("some/set")
