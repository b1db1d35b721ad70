"""Which rows the data options mean."""

import sys
import types

import pytest

from emloc_jax.cli._options import DataOptions
from emloc_jax.cli._rows import read_source
from emloc_jax.errors import ConfigError
from emloc_jax.training import LabelledRow, Row

PAIR = {"sentence1": "a", "sentence2": "b", "label": 1, "text": "c", "prompt": "d"}
PAIR |= {"completion": "e", "instruction": "f", "output": "g"}


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, Row("row 1", "d", "e")),
        ({"columns": {"prompt": "text", "completion": "is {label}"}}, Row("row 1", "c", "is 1")),
        ({"columns": {"text": "text", "label": "label"}}, LabelledRow("row 1", "c", None, "1")),
        ({"format": "glue/rte"}, LabelledRow("row 1", "a", "b", "not_entailment")),
        ({"format": "glue/stsb"}, LabelledRow("row 1", "a", "b", 1.0)),
    ],
)  # fmt: skip
def test_rows_by_columns_and_by_format(options, expected):
    assert read_source([PAIR], DataOptions(train="", **options)) == [expected]


@pytest.mark.parametrize("name", ["alpaca", "code"])
def test_instructions(name):
    (row,) = read_source([PAIR, PAIR], DataOptions(train="", format=name), first=1)
    assert isinstance(row, Row) and row.prompt.endswith("\nf\n\n### Response:")


@pytest.mark.parametrize("name", ["glue", "glue/", "glue/snli", "Alpaca", "csv"])
def test_formats_that_do_not_exist(name):
    with pytest.raises(ConfigError, match=f"data.format={name} does not exist.*alpaca.*rte"):
        read_source([PAIR], DataOptions(train="", format=name))


def test_the_hub_s_glue_has_a_configuration_per_task(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [PAIR]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    glue = DataOptions(train="", format="glue/rte")
    assert read_source("hub:nyu-mll/glue:validation", glue)[0].text == "a"
    read_source("hub:some/pairs", glue)
    assert asked == [
        (("nyu-mll/glue", "rte"), {"split": "validation"}),
        (("some/pairs", None), {"split": "train"}),
    ]
