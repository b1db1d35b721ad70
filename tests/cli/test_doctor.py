"""`emloc doctor`: prints, advises, writes JSON, and refuses before it measures."""

import functools
import json

import pytest

from emloc_jax.cli import main
from emloc_jax.cli._console import results
from emloc_jax.cli._doctor import doctor_tables
from emloc_jax.memory import _probes
from tests.memory.machines import GPU
from tests.memory.test_probes import SMALL


@pytest.mark.parametrize("measure", [True, False])
def test_doctor(tmp_path, monkeypatch, capsys, measure):
    small = functools.partial(_probes.measure_rates, **SMALL)
    monkeypatch.setattr(_probes, "measure_rates", small)
    output = tmp_path / "new" / "machine.json"
    options = [f"folder={tmp_path}", f"measure={measure}", f"output={output}"]
    assert main(["doctor", *options]) == 0
    printed = capsys.readouterr().out
    content = json.loads(output.read_text())
    assert ("GFLOP/s" in printed) is measure is (content["rates"] is not None)
    advice = [item["what"] for item in content["advice"]]
    assert "The cpu backend keeps no memory statistics." in advice
    words = " ".join(printed.split())
    assert all(" ".join(what.split()) in words for what in advice)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_tables_of_a_gpu(capsys):
    for table in doctor_tables(GPU):
        results.print(table)
    printed = capsys.readouterr().out
    assert "76.0 GiB" in printed and "50.00 GB/s" in printed and "pinned_host" in printed


@pytest.mark.parametrize(
    ("folder", "output", "words"),
    [("nowhere", "new.json", "no folder"), (".", "there.json", "exists already")],
)
def test_what_is_refused(tmp_path, capsys, folder, output, words):
    (tmp_path / "there.json").write_text("keep")
    assert main(["doctor", f"folder={tmp_path / folder}", f"output={tmp_path / output}"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep"]
