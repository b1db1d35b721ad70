"""`emloc finetune` from checkpoint to checkpoint, judged by torch."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from emloc_jax.checkpoints import load_emulator, load_pretrained
from emloc_jax.cli import main
from emloc_jax.emulator import _moment_forms
from emloc_jax.errors import CheckpointError

TOKENS = np.arange(12)[None] + 5


def torch_logits(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


def our_logits(folder):
    base = load_pretrained(folder, tokenizer=False)
    return np.asarray(base.model.apply({"params": base.params}, TOKENS))


def check_ledger(report, run):
    """Every stage is there, once, and its files are those of the folders that it made."""
    rows = {row["stage"]: row for row in report["ledger"]["stages"]}
    assert list(rows) == [
        "evaluation", "calibration", "factorization", "training", "export", "correction", "merge"
    ]  # fmt: skip
    assert {name: row["visits"] for name, row in rows.items() if row["visits"] > 1} == {
        "evaluation": 4,
        "export": 2,
    }
    assert rows["training"]["predicted_bytes"] == report["facts"]["training step_bytes"]
    folders = {"merge": ["merged"], "factorization": ["emulator"]}
    folders["export"] = ["adapter", "adapter_corrected"]
    for stage, names in folders.items():
        files = [p for name in names for p in (run / name).rglob("*") if p.is_file()]
        assert rows[stage]["left_bytes"] == sum(p.stat().st_size for p in files)
    for row in rows.values():
        assert row["seconds"] > 0 and row["resident_peak"]["at_most"] > 2**20


@pytest.mark.parametrize("scan", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_emloc_leaves_what_it_promises(tmp_path, model_folder, common, scan):
    run = tmp_path / "run"
    assert main(["finetune", *common, f"output={run}", f"model.scan_layers={scan}"]) == 0
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "report.json", "correction.json", "curves.png", "answers",
        "checkpoints", "emulator", "adapter", "adapter_corrected", "merged",
    }  # fmt: skip

    report = json.loads((run / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == [
        "zero-shot",
        "adapter on the emulator",
        "adapter on the original, uncorrected",
        "adapter on the original, corrected",
    ]
    assert report["stages"][1]["parameters"] < report["stages"][0]["parameters"]
    check_ledger(report, run)
    losses = json.loads((run / "correction.json").read_text())["calibration_loss"]
    chosen = str(report["facts"]["correction limit"])
    assert losses[chosen] == min(losses.values()) <= losses["0.0"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]

    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert merged.state_dict().keys() == base.state_dict().keys()
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter_corrected")
    ours = our_logits(run / "merged")
    np.testing.assert_allclose(torch_logits(merged), ours, atol=1e-4)
    np.testing.assert_allclose(torch_logits(adapted), ours, atol=1e-4)
    assert np.abs(ours - our_logits(model_folder)).max() > 1e-2  # something was learnt
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    assert tokenizer.eos_token == "<|im_end|>"
    layouts = {
        layout: load_pretrained(model_folder, tokenizer=False, scan_layers=layout == "true")
        for layout in ("true", "false")
    }
    emulator = load_emulator(run / "emulator", layouts.pop(scan))
    assert "layers" in emulator
    with pytest.raises(CheckpointError, match=f"scan_layers={scan.title()}"):
        load_emulator(run / "emulator", *layouts.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_other_methods(tmp_path, model_folder, common, method):
    run = tmp_path / "run"
    extra = [f"method={method}", f"output={run}", "eval.scores=[]", "train.evaluate_every=3"]
    assert main(["finetune", *common, *extra]) == 0
    report = json.loads((run / "report.json").read_text())
    ledger = [row["stage"] for row in report["ledger"]["stages"]]
    assert ledger == ["evaluation", "training", *(["export"] if method == "lora" else []), "merge"]
    before, after = (stage["loss"] for stage in report["stages"])
    assert after < before
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "test_loss" in r] == [3, 6]
    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    np.testing.assert_allclose(torch_logits(merged), our_logits(run / "merged"), atol=1e-4)


def test_an_existing_output_is_left_alone(tmp_path, common, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("keep")
    assert main(["finetune", *common, f"output={run}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_options_that_change_the_path(tmp_path, common, monkeypatch):
    # The weighted correction has full moments, whatever the width beyond which `auto` is compact.
    monkeypatch.setattr(_moment_forms, "AUTO_WIDTH", 1)
    run = tmp_path / "run"
    extra = [
        "emulator.weighting=one_sided", "correct.limit=3", "correct.weighted=true",
        "lora.rslora=true", "lora.dropout=0.1", "train.accumulation=2", "data.packing=true",
        "data.max_length=48", "emulator.save_moments=true", "eval.scores=[]",
        "model.scan_layers=false", "emulator.skip=['layers/1/mlp/down_proj']",
    ]  # fmt: skip
    assert main(["finetune", *common, *extra, f"output={run}"]) == 0
    assert (run / "moments.safetensors").exists()
    report = json.loads((run / "emulator" / "report.json").read_text())
    assert "skipped" in json.dumps(report)
