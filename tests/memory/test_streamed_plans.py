"""Plans of streamed stages against the arrays and the programs of stages that really run."""

import jax
import pytest

from emloc_jax._program_memory import analysed
from emloc_jax.emulator import Taps
from emloc_jax.memory import Planner, Setting, measure_stage, target_named
from emloc_jax.memory._emloc_stages import correction
from emloc_jax.memory._streamed_lora import streamed_lora_training
from emloc_jax.memory._streamed_stages import (
    streamed_calibration,
    streamed_correction,
    streamed_factorization,
)
from emloc_jax.memory._whole_stages import whole_calibration
from emloc_jax.models import MemoryBlocks, block_stack
from emloc_jax.streaming import Spill, _passes, layer_kernels, streamed_model
from emloc_jax.streaming._passes import Passes
from tests.memory.models import batch_of, real, tiny

SETTING = Setting(
    batch_size=1, length=16, ratio=0.5, lora_rank=2, chunk=16, calibration_rows=2
)  # fmt: skip


def layers_of(abstract):
    kernels = {p: s for p, s in abstract.kernels.items() if p.startswith("layers")}
    return layer_kernels(kernels, abstract.model.config.num_layers, scanned=True)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_planned_calibration_is_the_one_that_runs(gradients, monkeypatch, tmp_path):
    """The tapped program is caught at work, with its real arrays, and what the spill holds."""
    abstract, setting = tiny("bfloat16"), SETTING.replace(gradients=gradients)
    (stage,) = streamed_calibration(abstract, setting, target_named())
    name = "tapped_backward" if gradients else "tapped_forward"
    make, caught, held = getattr(_passes, name), [], []

    def watched(block, taps):
        run = make(block, taps)

        def call(*arguments):
            caught.append((analysed(run.lower(*arguments)), nbytes(arguments[:2])))
            held.append(spill.held)
            return run(*arguments)

        return call

    monkeypatch.setattr(_passes, name, watched)
    params = real(abstract.params)
    model, layers = streamed_model(abstract.model, chunk=setting.chunk), layers_of(abstract)
    spill = Spill(tmp_path)
    passes = Passes(
        model,
        MemoryBlocks(block_stack(abstract.model), params),
        [batch_of(setting)] * setting.calibration_rows,
        lambda index: Taps(layers[index].specs, gradients=gradients),
        spill,
        lambda *_: None,
    )
    passes.two_sided(2) if gradients else passes.one_sided(0)
    program = stage.programs["backward" if gradients else "forward"]
    ran, arguments = caught[0]
    assert len(caught) == 3 * setting.calibration_rows
    assert analysed(program.lowered) == ran
    assert sum(program.arguments.values()) == arguments
    assert stage.host["activations"] == max(held)
    block = nbytes(params["layers"]) // 3
    assert program.beside["next block"] == block
    outer = nbytes({key: value for key, value in params.items() if key != "layers"})
    assert program.beside.get("outer parameters", 0) == (0 if gradients else outer)


@pytest.mark.parametrize("maker", [streamed_calibration, streamed_factorization])
def test_streamed_peaks_do_not_grow_with_depth(maker):
    shallow, deep = (
        measure_stage(next(maker(tiny(num_hidden_layers=n), SETTING, target_named())))
        for n in (2, 6)
    )
    assert shallow.parts == deep.parts
    assert deep.host["activations"] == 3 * shallow.host["activations"]


def test_activations_beyond_the_limit_are_files():
    abstract, target = tiny(), target_named()
    (free,) = streamed_calibration(abstract, SETTING, target)
    (bound,) = streamed_calibration(abstract, SETTING.replace(activations=1000), target)
    assert bound.host["activations"] == 1000
    more = bound.disk["activations"] - free.disk["activations"]
    assert more == free.host["activations"] - 1000 > 0


def test_moments_of_a_block_stay_while_it_is_factored():
    abstract = tiny()
    (stage,) = streamed_factorization(abstract, SETTING, target_named())
    taps = Taps(layers_of(abstract)[0].specs, gradients=True)
    moments = nbytes(taps.zeros())
    for name, program in stage.programs.items():
        assert program.beside["moments"] == moments, name
    found = stage.programs["factors of mlp/down_proj/kernel"]
    # Of fp32 the kernel is the block's own array, and the moments are among what is beside.
    assert found.shared == 4 * (64 * 32 + 64 * 64 + 32 * 32) == analysed(found.lowered).arguments


def test_trials_of_all_limits_are_counted():
    limit, correct = streamed_correction(tiny(), SETTING, target_named())
    assert (limit.name, correct.name) == ("choose limit", "correct")
    whole = correct.programs["bound of layers/mlp/down_proj/kernel"].beside["adapters"] // 3
    trials = limit.programs["block"].beside["trials"]
    # Six joined adapters; by layer, five `lora_b` and one `lora_a`, each about half of one.
    assert 8.5 * whole < trials < 9.5 * whole
    (correct,) = streamed_correction(tiny(), SETTING.replace(choose_limit=False), target_named())
    assert correct.name == "correct"


@pytest.mark.parametrize("stream", [True, False])
def test_a_weighted_correction_holds_second_moments(stream):
    abstract = tiny()
    setting = SETTING.replace(weighted=True, choose_limit=False, stream=stream, gradients=False)
    stages = {stage.name: stage for stage in correction(abstract, setting, target_named())}
    layers = layers_of(abstract)
    moments = nbytes(Taps(layers[0].specs, moments="full").zeros())
    plain = SETTING.replace(gradients=False, moments="full")
    if stream:
        (passes,) = streamed_calibration(abstract, plain, target_named())
        weigh = stages["weigh the correction"]
        assert {name: p.lowered.as_text() for name, p in weigh.programs.items()} == {
            name: p.lowered.as_text() for name, p in passes.programs.items()
        }
    else:
        assert list(stages) == ["correct"]
        assert stages["correct"].resident["moments"] == len(layers) * moments
    program = stages["correct"].programs["terms of layers/mlp/down_proj/kernel"]
    assert program.beside["moments"] == (moments if stream else 0)
    light = next(correction(abstract, setting.replace(weighted=False), target_named()))
    plainly = light.programs["terms of layers/mlp/down_proj/kernel"].lowered
    side = 4 * abstract.kernels["layers/mlp/down_proj/kernel"].d_in ** 2
    assert analysed(program.lowered).arguments == analysed(plainly).arguments + side


def test_blocks_inputs_can_wait_on_the_host():
    abstract = tiny(num_hidden_layers=6)
    device, host = (
        measure_stage(next(streamed_lora_training(abstract, setting, target_named())))
        for setting in (SETTING, SETTING.replace(block_inputs="host"))
    )
    x = SETTING.length * 32 * 4
    assert host.host["blocks' inputs"] == 6 * x
    assert "blocks' inputs" not in device.host
    assert device.parts["blocks' inputs"] == 6 * x and host.parts["blocks' inputs"] == 2 * x
    assert device.device - host.device == 4 * x


def test_an_evaluation_is_planned_only_with_rows():
    planner = Planner(tiny())
    stages = planner.plan(["lora", "streamed_lora"], SETTING.replace(eval_rows=3, eval_batch=2))
    found = {s.method: s for s in stages.stages if s.name == "evaluate"}
    assert {*found} == {"lora", "streamed_lora"}
    batches, x = 2, 2 * SETTING.length * 32 * 4
    assert found["streamed_lora"].host["activations"] == batches * x
    names = {s.name for s in planner.plan(["lora", "streamed_lora"], SETTING).stages}
    assert names == {"train", "merge"}


def test_in_memory_all_second_moments_are_there_at_once():
    abstract, target = tiny(), target_named()
    streamed, whole = (
        next(maker(abstract, SETTING, target))
        for maker in (streamed_calibration, whole_calibration)
    )
    arguments = whole.programs["step"].arguments
    assert arguments["moments"] == 3 * streamed.programs["backward"].arguments["moments"]
    assert arguments["parameters"] == nbytes(real(abstract.params))
