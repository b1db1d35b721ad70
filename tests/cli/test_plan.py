"""`emloc plan`: figures in, a choice and predictions out, no weights needed."""

import json
import shutil

import pytest

from emloc_jax.cli import main

FIGURES = [
    "hardware.to_host=16GB",
    "hardware.to_device=16GB",
    "hardware.host_adam=1e9",
    "hardware.flops=1e12",
]


@pytest.fixture
def config_only(tmp_path, model_folder):
    """A folder that holds no weights."""
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copy(model_folder / "config.json", folder)
    return folder


def test_a_config_is_enough(tmp_path, config_only, capsys):
    output = tmp_path / "plan.json"
    arguments = ["plan", "method=lsp", f"source={config_only}", *FIGURES, f"output={output}"]
    assert main([*arguments, "batch_size=2", "length=64", "slowdown=50"]) == 0
    assert "native" in capsys.readouterr().out
    plan = json.loads(output.read_text())
    schedules = {row["schedule"]: row for row in plan["schedules"]}
    # Two layers of a model of width 32: q and o 32 x 32, k and v 32 x 16, the MLP 3 x 32 x 48.
    kernels = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    width = 2 if plan["chosen"]["wire"] == "bfloat16" else 4
    assert schedules["offload"]["bytes_to_host"] == kernels * width
    assert schedules["native"]["bytes_to_host"] == 0
    assert 0 < schedules["lsp"]["bytes_to_host"] <= kernels * width
    assert schedules["native"]["slowdown"] == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["hardware.flops=null"], "hardware.flops"),
        (["hardware.host_memory=1KB"], "memory of the host"),
        (["length=0"], "at least 1"),
        (["train={'layers/.*/kernle': subspace}"], "kernle"),
    ],
)
def test_what_cannot_be_planned(tmp_path, config_only, capsys, extra, words):
    output = tmp_path / "plan.json"
    arguments = ["plan", "method=lsp", f"source={config_only}", *FIGURES, f"output={output}"]
    assert main([*arguments, *extra]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_every_stage_beside_inference(tmp_path, config_only, capsys):
    output, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["plan", "method=lora", f"source={config_only}", "lora_rank=2", "length=64"]
    wanted = ["device_memory=1GiB", f"output={output}", f"figure={figure}"]
    assert main([*arguments, *wanted]) == 0
    printed = capsys.readouterr().out
    assert "lora train" in printed and "fits" in printed
    plan = json.loads(output.read_text())
    stages = {(row["method"], row["stage"]): row for row in plan["stages"]}
    assert plan["fits"] == {"inference": True, "lora": True}
    assert stages["lora", "train"]["device"] == sum(stages["lora", "train"]["parts"].values())
    assert figure.stat().st_size > 1000
    assert main([*arguments, f"output={output}"]) == 2  # exists


def test_a_budget_that_holds_nothing_is_refused_with_the_least(config_only, capsys):
    arguments = ["plan", "method=lora", f"source={config_only}", "lora_rank=2", "length=64"]
    assert main([*arguments, "device_memory=10KB"]) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert "No setting fits: the least possible is" in words and "What would have to give" in words


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["device_memory=lots"], "'lots' is not a size"),
        (["search=true"], "give device_memory"),
        (["target=abacus"], "rtx4090"),
        (["ratio=1.5"], "strictly between"),
        (["source=no/such/folder"], "no/such/folder"),
    ],
)
def test_plans_that_cannot_be_made(config_only, capsys, extra, words):
    assert main(["plan", "method=lora", f"source={config_only}", *extra]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
