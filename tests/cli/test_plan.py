"""`emloc plan`: figures in, a choice and predictions out, no weights needed."""

import json
import shutil

import pytest

from emloc_jax.cli import main
from tests.memory.image_models import CASES

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


@pytest.fixture(scope="module")
def image_configs(tmp_path_factory):
    """Folders of an InternVL and a FLUX without weights."""
    root = tmp_path_factory.mktemp("shapes")
    for name, (config, _) in CASES.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    ("model", "extra", "words"),
    [
        ("internvl", ["method=streamed_lora"], "held whole"),
        ("internvl", ["method=lsp", *FIGURES], "held whole"),
        ("internvl", ["stream=true"], "stream=false"),
        ("internvl", ["height=512", "width=512"], "height, width was given"),
        ("internvl", ["activations=1GiB"], "activations was given"),
        ("flux", [], "Give height and width"),
        ("flux", ["height=512"], "pictures need both"),
        ("flux", ["height=500", "width=512"], "multiples of 16"),
        ("flux", ["height=512", "width=512", "tiles=2"], "tiles was given"),
        ("flux", ["height=512", "width=512", "chunk=64"], "chunk was given"),
        ("text", ["tiles=2"], "tiles was given"),
        ("text", ["method=lsp", *FIGURES, "width=512"], "width was given"),
    ],
)
def test_options_that_a_model_has_no_use_for(
    config_only, image_configs, capsys, model, extra, words
):
    source = config_only if model == "text" else image_configs / model
    assert main(["plan", f"source={source}", "method=lora", *extra]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_picture_is_planned(tmp_path, image_configs, capsys):
    output = tmp_path / "plan.json"
    asked = ["method=inference", "height=32", "width=48", "length=5", "lora_rank=2"]
    arguments = ["plan", f"source={image_configs / 'flux'}", *asked, f"output={output}"]
    assert main(arguments) == 0
    assert "and latents=6, remat=block, stream=false" in " ".join(capsys.readouterr().out.split())
    setting = json.loads(output.read_text())["setting"]
    assert setting["latents"] == 6 and setting["stream"] is False
    assert setting["where"] == ["(double|single)_layers/.*"] == setting["lora_where"]
