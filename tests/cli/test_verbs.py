"""Stage by stage through folders, with the same results as in one go."""

import json

import numpy as np
from safetensors.numpy import load_file

from emloc_jax.checkpoints import load_orbax, load_pretrained
from emloc_jax.cli import main


def test_the_stages_reproduce_the_whole(tmp_path, model_folder, rows_file, common, capsys):
    run, out = tmp_path / "run", tmp_path / "stages"
    quiet = ["eval.scores=[]"]
    assert main(["finetune", *common, *quiet, "correct.limit=1", f"output={run}"]) == 0
    model = [f"model.source={model_folder}"]
    data = [f"data.train={rows_file}", "data.max_length=48"]
    emulator = ["emulator.ratio=0.5", "emulator.calibration_rows=16"]
    assert main(["emulate", *model, *data, *emulator, f"output={out}/emulator"]) == 0
    for name in ("emulator.safetensors", "emulator_config.json"):
        assert (out / "emulator" / name).read_bytes() == (run / "emulator" / name).read_bytes()

    adapter = [f"adapter={run}/adapter", f"emulator={out}/emulator", "correct.limit=1"]
    assert main(["correct", *model, *data, *adapter, f"output={out}/corrected"]) == 0
    mine, whole = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (out / "corrected", run / "adapter_corrected")
    )
    for key in whole:
        np.testing.assert_array_equal(mine[key], whole[key])

    assert main(["merge", *model, f"adapter={out}/corrected", f"output={out}/merged"]) == 0
    merged = load_file(out / "merged" / "model.safetensors")
    for key, value in load_file(run / "merged" / "model.safetensors").items():
        np.testing.assert_array_equal(merged[key], value)

    orbax = [f"model.source={out}/merged", "format=orbax", f"output={out}/orbax"]
    assert main(["export", *orbax]) == 0
    base = load_pretrained(out / "merged", scan_layers=True)
    restored = load_orbax(out / "orbax")
    np.testing.assert_array_equal(
        restored["layers"]["mlp"]["down_proj"]["kernel"],
        base.params["layers"]["mlp"]["down_proj"]["kernel"],
    )

    scores = ["eval.rows=8", "eval.max_new_tokens=4"]
    test = [f"data.train={rows_file}", "data.max_length=48", *scores, f"output={out}/eval"]
    assert main(["eval", *model, *test, f"adapter={out}/corrected"]) == 0
    report = json.loads((out / "eval" / "report.json").read_text())
    assert set(report["stages"][0]["scores"]) == {"exact_match"}
    assert len((out / "eval" / "answers.jsonl").read_text().splitlines()) == 8

    capsys.readouterr()
    short = ["sampling.max_new_tokens=3", "chat=false", "prompt=['say hello:', 'say two:']"]
    assert main(["generate", *model, *short, f"adapter={out}/corrected"]) == 0
    first = capsys.readouterr().out
    assert main(["generate", f"model.source={out}/merged", *short]) == 0
    assert capsys.readouterr().out == first
    drawn = ["sampling.temperature=1.0", "sampling.top_k=5", f"model.source={out}/merged"]
    assert main(["generate", *drawn, *short]) == 0


def test_automatic_and_weighted_correction(tmp_path, model_folder, rows_file, common):
    run = tmp_path / "run"
    assert main(["finetune", *common, "eval.scores=[]", f"output={run}"]) == 0
    arguments = [
        "correct", f"model.source={model_folder}", f"data.train={rows_file}", "data.max_length=48",
        f"adapter={run}/adapter", f"emulator={run}/emulator", "correct.weighted=true",
        "calibration.rows=16", f"output={tmp_path}/corrected",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert (tmp_path / "corrected" / "adapter_config.json").exists()
