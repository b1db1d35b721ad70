"""`emloc finetune method=lsp`, from checkpoint to checkpoint."""

import json

import numpy as np
import pytest
import torch
import transformers

from emloc_jax.checkpoints import load_pretrained
from emloc_jax.cli import main

TOKENS = np.arange(12)[None] + 5
LSP = ["method=lsp", "lsp.nnz=2", "lsp.fit_steps=5", "lsp.calibration_rows=4", "lsp.refit_every=3"]


def our_logits(folder):
    base = load_pretrained(folder, tokenizer=False)
    return np.asarray(base.model.apply({"params": base.params}, TOKENS))


def test_lsp_leaves_a_model_that_torch_reads(tmp_path, model_folder, common):
    run = tmp_path / "run"
    assert main(["finetune", *common, *LSP, "lsp.profile=true", f"output={run}"]) == 0
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "report.json", "curves.png", "merged"}
    assert names >= {"timeline.png", "timeline.json"}
    report = json.loads((run / "report.json").read_text())
    zero, tuned = report["stages"]
    assert (zero["name"], tuned["name"]) == ("zero-shot", "all parameters tuned")
    assert tuned["loss"] < zero["loss"]
    ledger = [row["stage"] for row in report["ledger"]["stages"]]
    assert ledger == ["evaluation", "training", "merge"]
    facts = report["facts"]
    assert facts["checks of the projectors"] == 2
    assert facts["estimation error, fitted"] < facts["estimation error, unfitted"]
    assert facts["to host per step_bytes"] > 0

    merged = transformers.AutoModelForCausalLM.from_pretrained(run / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        logits = merged(torch.as_tensor(TOKENS)).logits.numpy()
    ours = our_logits(run / "merged")
    np.testing.assert_allclose(logits, ours, atol=1e-4)
    assert np.abs(ours - our_logits(model_folder)).max() > 1e-3


def test_rules_replace_the_default(tmp_path, model_folder, common):
    run = tmp_path / "run"
    rules = "lsp.train={'layers/self_attn/.*': frozen, 'layers/mlp/down_proj': host}"
    arguments = ["method=lsp", "lsp.schedule=layerwise", "train.steps=1", "train.warmup=0", rules]
    assert main(["finetune", *common, *arguments, "eval.scores=[]", f"output={run}"]) == 0
    before = load_pretrained(model_folder, tokenizer=False).params["layers"]["0"]
    after = load_pretrained(run / "merged", tokenizer=False).params["layers"]["0"]
    for module in ("gate_proj", "up_proj"):
        np.testing.assert_array_equal(
            after["mlp"][module]["kernel"], before["mlp"][module]["kernel"]
        )
    np.testing.assert_array_equal(
        after["self_attn"]["q_proj"]["kernel"], before["self_attn"]["q_proj"]["kernel"]
    )
    assert (after["mlp"]["down_proj"]["kernel"] != before["mlp"]["down_proj"]["kernel"]).any()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("lsp.subspace=33", "33"),
        ("lsp.subspace=2.5", "whole number"),
        ("lsp.nnz=17", "nnz"),
        ("lsp.calibration_rows=0", "calibration_rows"),
        ("lsp.schedule=zero", "schedule"),
        ("lsp.train={'layers/.*/kernle': subspace}", "kernle"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, common, capsys, option, words):
    run = tmp_path / "run"
    assert main(["finetune", *common, *LSP, option, f"output={run}"]) == 2
    assert words in capsys.readouterr().err
    assert not run.exists()
