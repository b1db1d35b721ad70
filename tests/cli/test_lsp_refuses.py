"""What `emloc finetune method=lsp` refuses: status 2, and a message that says why."""

import shutil

import pytest
from safetensors.numpy import load_file, save_file

from emloc_jax.cli import main

# One kernel to compress, so one fit to compile.
LSP = [
    "method=lsp",
    "lsp.train={'layers/mlp/down_proj': subspace}",
    "lsp.nnz=2",
    "lsp.fit_steps=2",
    "lsp.calibration_rows=4",
    "train.steps=3",
    "train.warmup=0",
    "data.test=null",
    "eval.scores=[]",
]


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("lsp.host_memory=6143", "6.14e-06 GB on the host, and 6.14e-06 GB `host_memory` allows"),
        ("lsp.host_memory=plenty", "'plenty' is not a size"),
        ("data.train=EMPTY", "empty.jsonl"),
        ("lsp.product=fast", "product"),
    ],
)
def test_before_anything_is_made(tmp_path, common, capsys, option, words):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    option, run = option.replace("EMPTY", str(empty)), tmp_path / "run"
    assert main(["finetune", *common, *LSP, option, f"output={run}"]) == 2
    assert words in said(capsys)
    assert not run.exists()


def test_gradients_that_are_not_finite(tmp_path, common, capsys):
    """The first step spoils the weights; what comes after is neither applied nor saved."""
    whole = ["lsp.schedule=layerwise", "train.learning_rate=1e38", "train.save_every=1"]
    run = tmp_path / "run"
    assert main(["finetune", *common, *LSP, *whole, f"output={run}"]) == 2
    assert "step 2: the loss is nan" in said(capsys)
    assert (run / "metrics.jsonl").read_text().count("\n") == 1
    assert not (run / "merged").exists()


def test_calibration_gradients_that_are_not_finite(tmp_path, model_folder, common, capsys):
    large = shutil.copytree(model_folder, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    arguments = [*common, *LSP, f"model.source={large}", f"output={run}"]
    assert main(["finetune", *arguments]) == 2
    message = said(capsys)
    assert "calibration gradient of 'mlp/down_proj/kernel'" in message
    assert "not finite before step 1" in message


def test_a_resumption_with_other_projectors(tmp_path, common, capsys):
    run = tmp_path / "run"
    first = ["finetune", *common, *LSP, f"output={run}"]
    assert main(first) == 0
    before = (run / "merged" / "model.safetensors").read_bytes()
    for option, words in {
        "lsp.nnz=3": "lsp.nnz: 2 -> 3",
        "lsp.subspace=0.25": "lsp.subspace: 0.5 -> 0.25",
        "seed=1": "seed: 0 -> 1",
    }.items():
        capsys.readouterr()
        assert main([*first, "--resume", option]) == 2
        assert words in said(capsys)
    assert (run / "merged" / "model.safetensors").read_bytes() == before
