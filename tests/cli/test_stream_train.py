"""`finetune` whole in memory and a block at a time: the same bits, with and without a polish."""

import json
import shutil

import pytest

from emloc_jax.cli import main
from tests.streaming.tiny_run import same_folder


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_second", "compile_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def report(run):
    return json.loads((run / "report.json").read_text())


def weights(run, name):
    return (run / name / "adapter_model.safetensors").read_bytes()


def test_streamed_lora_leaves_the_bytes_of_lora_in_memory(tmp_path, common):
    extra = ["method=lora", "train.evaluate_every=3", "lora.dropout=0.1", "train.accumulation=2"]
    how = {"whole": ["stream=false"], "streamed": ["stream=true", "train.block_inputs=host"]}
    for name, more in how.items():
        assert main(["finetune", *common, *extra, *more, f"output={tmp_path / name}"]) == 0
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    assert not same_folder(whole / "adapter", streamed / "adapter")
    assert not same_folder(whole / "merged", streamed / "merged")
    assert records(streamed) == records(whole)
    assert report(streamed)["stages"] == report(whole)["stages"]
    assert report(streamed)["facts"]["training step_bytes"] > 0


@pytest.mark.slow
def test_streamed_emloc_leaves_the_bytes_of_emloc_in_memory(tmp_path, common):
    extra = ["polish.steps=3", "lora.dropout=0.1", "train.accumulation=2", "eval.rows=4"]
    for stream in ("true", "false"):
        how = [f"stream={stream}", f"output={tmp_path / stream}"]
        assert main(["finetune", *common, *extra, *how]) == 0
    one, other = tmp_path / "true", tmp_path / "false"
    for name in ("emulator", "adapter", "adapter_corrected", "adapter_polished", "merged"):
        assert not same_folder(other / name, one / name), name
    assert weights(one, "adapter_polished") != weights(one, "adapter_corrected")
    assert (one / "correction.json").read_bytes() == (other / "correction.json").read_bytes()
    assert records(one / "polish") == records(other / "polish")
    assert [record["step"] for record in records(one / "polish")] == [1, 2, 3]
    assert report(one)["stages"] == report(other)["stages"]
    assert report(one)["stages"][-1]["name"] == "adapter on the original, polished"

    polished = weights(one, "adapter_polished")
    for name in ("polish", "adapter_polished", "merged"):  # as if the run had died before these
        shutil.rmtree(one / name)
    again = ["stream=true", f"output={one}"]
    assert main(["finetune", "--resume", *common, *extra, *again]) == 0
    assert weights(one, "adapter_polished") == polished
    assert not same_folder(other / "merged", one / "merged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stream=true", "method=full"], "stream=true was asked for with method=full"),
        (["stream=true", "emulator.save_moments=true"], "keeps a block's moments only until"),
        (["stream=perhaps"], "it is auto, true or false"),
        (["polish.steps=-1"], "polish.steps is -1"),
        (["polish.steps=1"], "polish: learning rate"),
        (["polish.steps=2", "method=lora"], "a polish follows the correction"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path, common, capsys, options, message
):
    assert main(["finetune", *common, *options, f"output={tmp_path / 'run'}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
