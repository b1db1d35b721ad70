"""The compression report as table, text and JSON."""

import json

import pytest
from rich.table import Table

from emloc_jax.emulator import CompressionReport, KernelReport
from emloc_jax.errors import CheckpointError, OutputExistsError


def make_report():
    compressed = KernelReport(
        path="layers/up/kernel",
        shape=(2, 8, 16),
        rank=2,
        ratio=0.375,
        calibration_error=0.1234,
        weighted_error=0.1,
        bytes_before=1024,
        bytes_after=384,
        status="compressed",
    )
    whole = KernelReport(
        "embed/embedding", (9, 8), None, 1.0, None, None, 288, 288, "kept", "tied embedding"
    )
    return CompressionReport((compressed, whole), "two_sided")


def test_report_survives_json(tmp_path):
    report, path = make_report(), tmp_path / "report.json"
    report.save(path)
    assert CompressionReport.load(path) == report
    assert json.loads(path.read_text())["kernels"][0]["shape"] == [2, 8, 16]
    with pytest.raises(OutputExistsError):
        report.save(path)


def test_report_sums_up():
    report = make_report()
    assert (report.bytes_before, report.bytes_after) == (1312, 672)
    assert report.ratio == pytest.approx(672 / 1312)
    assert report.ranks == {"layers/up/kernel": 2, "embed/embedding": None}
    assert report["layers/up/kernel"].ratio == 0.375
    assert len(list(report)) == 2


def test_report_is_a_table_and_a_text():
    report = make_report()
    assert isinstance(report.table(), Table)
    text = str(report)
    for word in ("layers/up/kernel", "2x8x16", "0.375", "0.1234", "tied embedding", "two-sided"):
        assert word in text
    assert "1 of 2 compressed" in text


@pytest.mark.parametrize("content", [None, "{", "{}", '{"kernels": [{"path": "x"}]}'])
def test_files_that_are_no_report_are_refused(tmp_path, content):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json"):
        CompressionReport.load(path)
