"""LoRA on the original from the command line: whole and streamed give the same bits."""

import json
import shutil

import pytest

from emloc_jax.cli import main


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_second", "compile_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def losses(run):
    return [stage["loss"] for stage in json.loads((run / "report.json").read_text())["stages"]]


def weights(run, name):
    return (run / name / "adapter_model.safetensors").read_bytes()


def test_streamed_lora_leaves_the_bytes_of_lora_in_memory(tmp_path, common):
    extra = ["method=lora", "eval.scores=[]", "train.evaluate_every=3", "lora.dropout=0.1"]
    for name, more in {"whole": [], "streamed": ["stream=true", "train.block_inputs=host"]}.items():
        assert main(["finetune", *common, *extra, *more, f"output={tmp_path / name}"]) == 0
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    assert weights(streamed, "adapter") == weights(whole, "adapter")
    assert records(streamed) == records(whole)
    assert losses(streamed) == losses(whole)
    facts = json.loads((streamed / "report.json").read_text())["facts"]
    assert facts["training step_bytes"] > 0
    assert not (streamed / "merged").exists()


def test_polish_gives_the_same_bytes_whole_streamed_and_resumed(tmp_path, common):
    extra = ["eval.scores=[]", "polish.steps=3", "lora.dropout=0.1", "train.accumulation=2"]
    extra += ["correct.limit=1"]
    for stream in ("true", "false"):
        run = tmp_path / stream
        assert main(["finetune", *common, *extra, f"polish.stream={stream}", f"output={run}"]) == 0
    one, other = tmp_path / "true", tmp_path / "false"
    for name in ("adapter_corrected", "adapter_polished"):
        assert weights(one, name) == weights(other, name)
    assert weights(one, "adapter_polished") != weights(one, "adapter_corrected")
    assert records(one / "polish") == records(other / "polish")
    assert [record["step"] for record in records(one / "polish")] == [1, 2, 3]
    assert losses(one) == losses(other)
    polished = weights(one, "adapter_polished")
    for name in ("polish", "adapter_polished", "merged"):  # as if the run had died before these
        shutil.rmtree(one / name)
    assert main(["finetune", "--resume", *common, *extra, f"output={one}"]) == 0
    assert weights(one, "adapter_polished") == polished
    stages = json.loads((one / "report.json").read_text())["stages"]
    assert stages[-1]["name"] == "adapter on the original, polished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stream=true"], "method=lora"),
        (["method=lora", "stream=true"], "eval.scores=[]"),
        (["polish.steps=-1"], "polish.steps is -1"),
        (["polish.steps=1"], "polish: learning rate"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path, common, capsys, options, message
):
    assert main(["finetune", *common, *options, f"output={tmp_path / 'run'}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
