"""GLUE's files in their official layouts and as Hugging Face gives them."""

import json
import logging

import pytest

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training import GLUE_TASKS, glue_task, read_glue_rows

# Lines as in the official files: header (CoLA has none), then rows; nothing is quoted.
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse"
MNLI = MNLI.split() + ["sentence2_parse", "sentence1", "sentence2"]
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
OFFICIAL = {
    "cola": (
        None,
        [["gj04", "1", "", 'He said "so.'], ["gj04", "0", "*", "Him said so."]],
        [('He said "so.', None, "acceptable"), ("Him said so.", None, "unacceptable")],
    ),
    "sst2": (
        ["sentence", "label"],
        [["dull ", "0"], ["a joy ", "1"]],
        [("dull ", None, "negative"), ("a joy ", None, "positive")],
    ),
    "mrpc": (
        ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        [["1", "7", "8", '"Yes," he said.', "He said yes."], ["0", "9", "10", "A", "B"]],
        [('"Yes," he said.', "He said yes.", "equivalent"), ("A", "B", "not_equivalent")],
    ),
    "qqp": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        [["1", "2", "3", "Why?", "", "0"], ["4", "broken"], ["5", "6", "7", "Who?", "Who?", "1"]],
        [("Why?", "", "not_duplicate"), ("Who?", "Who?", "duplicate")],
    ),
    "stsb": (
        STSB,
        [["0", "g", "f", "2012", "1", "s", "s", "A plane.", "An air plane.", "4.750"]],
        [("A plane.", "An air plane.", 4.75)],
    ),
    "mnli": (
        [*MNLI, "label1", "gold_label"],
        [["0", "1", "2", "fiction", "b", "b", "p", "p", "P", "H", "neutral", "contradiction"]],
        [("P", "H", "contradiction")],
    ),
    "qnli": (
        ["index", "question", "sentence", "label"],
        [["0", "When?", "In 1999.", "entailment"]],
        [("When?", "In 1999.", "entailment")],
    ),
    "rte": (
        ["index", "sentence1", "sentence2", "label"],
        [["0", "It rained.", "It was dry.", "not_entailment"]],
        [("It rained.", "It was dry.", "not_entailment")],
    ),
    "wnli": (
        ["index", "sentence1", "sentence2", "label"],
        [["0", "He saw it.", "It was seen.", "1"]],
        [("He saw it.", "It was seen.", "entailment")],
    ),
}


def tsv(folder, header, lines, ending="\n"):
    path = folder / "train.tsv"
    rows = lines if header is None else [header, *lines]
    path.write_bytes("".join("\t".join(row) + ending for row in rows).encode())
    return path


def content(rows):
    return [(row.text, row.text_pair, row.label) for row in rows]


def test_the_table_has_nine_tasks():
    assert set(OFFICIAL) == set(GLUE_TASKS) and len(GLUE_TASKS) == 9
    assert [glue_task(name).metrics for name in ("cola", "qqp", "stsb", "mnli")] == [
        ("matthews",), ("accuracy", "f1"), ("pearson", "spearman"), ("accuracy",),
    ]  # fmt: skip


@pytest.mark.parametrize("task", OFFICIAL)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_official_files(tmp_path, task, ending):
    header, lines, expected = OFFICIAL[task]
    path = tsv(tmp_path, header, lines, ending)
    rows = read_glue_rows(path, task)
    assert content(rows) == expected
    assert rows[0].origin == f"{path}:{1 if header is None else 2}"


def test_broken_lines_of_qqp_are_told_and_others_refused(tmp_path, caplog):
    header, lines, _ = OFFICIAL["qqp"]
    path = tsv(tmp_path, header, lines)
    with caplog.at_level(logging.WARNING):
        read_glue_rows(path, "qqp")
    assert "1 broken lines left out" in caplog.text and f"{path}:3" in caplog.text
    header, lines, _ = OFFICIAL["rte"]
    path = tsv(tmp_path, header, [*lines, ["1", "alone"]])
    with pytest.raises(DataError, match=r"train.tsv:3: 2 cells, but there are 4 columns"):
        read_glue_rows(path, "rte")


HUGGING_FACE = [
    ("cola", {"sentence": "Him said.", "label": 0}, ("Him said.", None, "unacceptable")),
    ("sst2", {"sentence": "a joy", "label": "1"}, ("a joy", None, "positive")),
    ("qqp", {"question1": "a", "question2": "b", "label": 1}, ("a", "b", "duplicate")),
    ("mnli", {"premise": "a", "hypothesis": "b", "label": 2}, ("a", "b", "contradiction")),
    ("qnli", {"question": "a", "sentence": "b", "label": 1}, ("a", "b", "not_entailment")),
    ("rte", {"sentence1": "a", "sentence2": "b", "label": 0}, ("a", "b", "entailment")),
    ("wnli", {"sentence1": "a", "sentence2": "b", "label": 0}, ("a", "b", "not_entailment")),
    ("mrpc", {"sentence1": "a", "sentence2": "b", "label": "equivalent"}, ("a", "b", "equivalent")),
    ("stsb", {"sentence1": "a", "sentence2": "b", "label": 2.5}, ("a", "b", 2.5)),
]


@pytest.mark.parametrize("task, record, expected", HUGGING_FACE)
def test_hugging_face_s_columns(tmp_path, task, record, expected):
    record["idx"] = 0
    assert content(read_glue_rows([record], task)) == [expected]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert content(read_glue_rows(path, task)) == [expected]


@pytest.mark.parametrize(
    "task, record, words",
    [
        ("rte", {"sentence1": "a", "sentence2": "b", "label": -1}, "row 1.*-1.*test set"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": "maybe"}, "'maybe'.*entailment .0."),
        ("rte", {"sentence1": "a", "sentence2": "b"}, "row 1.*label is missing"),
        ("rte", {"premise": "a", "hypothesis": "b", "label": 1}, "sentence1, sentence2 is missing"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 7}, "score from 0 to 5"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "high"}, "score from 0 to 5"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": float("nan")}, "from 0 to 5"),
        ("cola", {"sentence": 3, "label": 1}, "must be text"),
        ("cola", ["a"], "named fields"),
    ],
)
def test_malformed_rows_are_refused_by_place(task, record, words):
    with pytest.raises(DataError, match=words):
        read_glue_rows([record], task)


def test_a_file_of_another_task_or_without_labels(tmp_path):
    header, lines, _ = OFFICIAL["rte"]
    with pytest.raises(DataError, match=r"train.tsv:2: .*mrpc has #1 String.*Quality"):
        read_glue_rows(tsv(tmp_path, header, lines), "mrpc")
    unlabelled = tsv(tmp_path, header[:-1], [line[:-1] for line in lines])
    with pytest.raises(DataError, match="label is missing.*one with labels"):
        read_glue_rows(unlabelled, "rte")
    with pytest.raises(DataError, match="no row"):
        read_glue_rows(tsv(tmp_path, header, []), "rte")
    with pytest.raises(ConfigError, match="'snli'.*cola"):
        read_glue_rows([], "snli")
