"""Every request that cannot be carried out ends with status 2, a message, and nothing written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emloc_jax.cli import main


def refused(arguments, capsys, folder):
    """The message, after checking the status and that nothing but inputs is in `folder`."""
    before = sorted(folder.iterdir())
    assert main(arguments) == 2
    assert sorted(folder.iterdir()) == before
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("trian.steps=3", "trian"),
        ("train.steps=many", "could not be converted to Integer"),
        ("method=magic", "magic"),
        ("emulator.ratio=1.5", "1.5"),
        ("emulator.ratio=0", "0"),
        ("emulator.energy=0.9", "exactly one"),
        ("emulator.where=['blocks/.*']", "blocks/.*"),
        ("emulator.skip=['layers/w2']", "layers/w2"),
        ("lora.where=['attention']", "attention"),
        ("lora.rank=0", "rank"),
        ("emulator.moments=some", "some"),
        ("emulator.moments=compact correct.weighted=true", "emulator.moments is compact"),
        ("correct.limit=lots", "lots"),
        ("correct.limit=-1", "-1"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("data.max_length=8", "rows.jsonl:1"),
        ("data.train=[x", "YAML"),
        ("eval.scores=exact_match", "['value']"),
        ("eval.max_new_tokens=90", "rows.jsonl:1"),
        ("train.evaluate_every=0", "evaluate_every"),
        ("correct.rows=0", "correct.rows"),
        ("data.columns={prompt: question, completion: answer}", "question"),
        ("model.source=/nowhere/model", "/nowhere/model"),
        ("train.batch_size=5 train.accumulation=2", "accumulation"),
        ("eval.scores=['beauty']", "beauty"),
    ],
)
def test_options(tmp_path, common, capsys, option, said):
    arguments = ["finetune", *common, f"output={tmp_path}/run", *option.split(" ")]
    if option.startswith("data.columns"):
        arguments = ["finetune", *common, f"output={tmp_path}/run", option]
    assert said in refused(arguments, capsys, tmp_path)


def test_missing_options_are_named(capsys, tmp_path):
    message = refused(["finetune", f"output={tmp_path}/run"], capsys, tmp_path)
    assert "data.train" in message and "model.source" in message


def test_a_malformed_row(tmp_path, common, capsys):
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    arguments = ["finetune", *common, f"data.train={rows}", f"output={tmp_path}/run"]
    assert "bad.jsonl:2" in refused(arguments, capsys, tmp_path)


@pytest.fixture
def broken(tmp_path, model_folder):
    """A copy of the checkpoint to break."""
    return shutil.copytree(model_folder, tmp_path / "broken")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.vision.weight": np.ones(3)}, folder / "model.safetensors")


def reshape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    save_file(tensors, folder / "model.safetensors")


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, folder / "model.safetensors")


def rename(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors"),
        (drop_tensor, "model.layers.1.mlp.up_proj.weight"),
        (add_tensor, "model.vision.weight"),
        (reshape, "model.norm.weight"),
        (poison, "up_proj"),
        (rename, "Mamba"),
    ],
)
def test_damaged_checkpoints(tmp_path, broken, common, capsys, damage, said):
    damage(broken)
    arguments = ["finetune", *common, f"model.source={broken}", f"output={tmp_path}/run"]
    assert said in refused(arguments, capsys, tmp_path)


def test_an_adapter_or_emulator_of_another_base(tmp_path, broken, model_folder, common, capsys):
    run = tmp_path / "run"
    quick = ["data.test=null", "train.steps=2", "eval.scores=[]"]
    assert main(["finetune", *common, *quick, f"output={run}"]) == 0
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    other = [f"model.source={broken}", f"output={tmp_path}/out"]
    message = refused(["merge", *other, f"adapter={run}/adapter"], capsys, tmp_path)
    assert "base" in message
    pair = [f"adapter={run}/adapter", f"emulator={run}/emulator", "correct.limit=1"]
    message = refused(["correct", *other, *pair, "data.train=unused"], capsys, tmp_path)
    assert "base" in message
    # Correcting twice is refused too.
    mine = [f"model.source={model_folder}", "correct.limit=1", "data.train=unused"]
    once = [*mine, f"adapter={run}/adapter", f"emulator={run}/emulator"]
    assert main(["correct", *once, f"output={tmp_path}/once"]) == 0
    twice = [*mine, f"adapter={tmp_path}/once", f"emulator={run}/emulator"]
    message = refused(["correct", *twice, f"output={tmp_path}/twice"], capsys, tmp_path)
    assert "corrected" in message


def test_resume_with_another_configuration(tmp_path, common, capsys):
    run = tmp_path / "run"
    assert main(["finetune", *common, "eval.scores=[]", "method=lora", f"output={run}"]) == 0
    other = ["finetune", "--resume", *common, "eval.scores=[]", "method=lora", f"output={run}"]
    assert main([*other, "train.steps=9"]) == 2
    assert "train.steps: 6 -> 9" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "empty").mkdir()
    message = refused([*other, f"output={tmp_path}/empty"], capsys, tmp_path)
    assert "no run was started" in message
