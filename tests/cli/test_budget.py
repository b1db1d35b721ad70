"""`memory_budget` refuses before anything is written, and says what would fit."""

import json

import jax
import pytest

from emloc_jax.adapters import init_adapters
from emloc_jax.checkpoints import load_pretrained, save_adapter
from emloc_jax.cli import main
from emloc_jax.kernels import find_kernels

# One kernel is enough: programs of every other one are compiled in tests/memory.
ONE = "layers/mlp/down_proj"
ONE_KERNEL = [f"emulator.where=[{ONE}]", f"lora.where=[{ONE}]"]


def message(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("method", "stream"), [("emloc", "false"), ("lora", "true"), ("full", "false")]
)
def test_a_run_that_cannot_fit_is_refused_with_the_least_possible(
    tmp_path, common, capsys, method, stream
):
    asked = [f"method={method}", f"stream={stream}", f"output={tmp_path / 'run'}"]
    assert main(["finetune", *common, *ONE_KERNEL, *asked, "memory_budget=4KiB"]) == 2
    assert "No setting fits: the least possible is" in message(capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_is_refused_with_one_that_does(tmp_path, common, capsys):
    asked = ["method=lora", "stream=false", f"output={tmp_path / 'run'}"]
    assert main(["finetune", *common, *asked, "memory_budget=500KiB"]) == 2
    assert "The nearest setting that fits:" in message(capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fits_goes_on_and_its_step_is_within_the_plan(tmp_path, common):
    run = tmp_path / "run"
    options = ["polish.steps=2", "eval.scores=[]", "eval.rows=2", "stream=false"]
    options += ["memory_budget=64MiB", "correct.limit=1", "polish.warmup=0", *ONE_KERNEL]
    assert main(["finetune", *common, *options, f"output={run}"]) == 0
    facts = json.loads((run / "report.json").read_text())["facts"]
    assert 0 < facts["training step_bytes"] < 64 * 2**20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["memory_budget=lots"], "lots"),
        (["emulator.ratio=null", "emulator.energy=0.9", "memory_budget=1GiB"], "energy=0.9"),
    ],
)
def test_budgets_that_cannot_be(tmp_path, common, capsys, options, said):
    assert main(["finetune", *common, *options, f"output={tmp_path / 'run'}"]) == 2
    assert said in message(capsys)
    assert not (tmp_path / "run").exists()


def test_single_stages_keep_a_budget(tmp_path, model_folder, rows_file, capsys):
    model, data = f"model.source={model_folder}", f"data.train={rows_file}"
    small = ["emulator.ratio=0.5", "emulator.calibration_rows=8", f"emulator.where=[{ONE}]"]

    def emulate(*more):
        return main(["emulate", model, data, *small, f"output={tmp_path / 'emulator'}", *more])

    assert emulate("memory_budget=4KiB", "stream=true") == 2
    assert "of emloc" in message(capsys)
    assert not (tmp_path / "emulator").exists()
    assert emulate("memory_budget=1GiB", "stream=false") == 0

    base = load_pretrained(model_folder, scan_layers=True)
    found = find_kernels(base.model.apply, base.params, jax.numpy.zeros((1, 8), int))
    kernels = {path: spec for path, spec in found.items() if not spec.tied}
    adapters = init_adapters(jax.random.key(0), kernels, where=ONE, rank=2, alpha=4)
    save_adapter(tmp_path / "adapter", adapters, base=base)
    given = [model, f"adapter={tmp_path / 'adapter'}"]
    correct = ["correct", *given, f"emulator={tmp_path / 'emulator'}", data, "calibration.rows=8"]
    for verb in (correct, ["merge", *given]):
        output = f"output={tmp_path / 'out'}"
        assert main([*verb, "stream=false", output, "memory_budget=1KiB"]) == 2
        assert "but the budget is 1.0 KiB" in message(capsys)
        assert not (tmp_path / "out").exists()
    assert main(["merge", *given, f"output={tmp_path / 'm'}", "memory_budget=1GiB"]) == 0
    assert main([*correct, f"output={tmp_path / 'c'}", "memory_budget=1GiB"]) == 0
