"""Figures of a plan against programs on real arrays, and of blocks against whole models."""

import dataclasses

import jax
import numpy as np
import pytest

from emloc_jax._program_memory import ProgramMemory, analysed
from emloc_jax.adapters import attach, init_adapters
from emloc_jax.emulator import compress
from emloc_jax.errors import ConfigError, PlanError
from emloc_jax.kernels import flatten_leaves, intercept
from emloc_jax.memory import (
    Planner,
    Program,
    Setting,
    abstract_emulator,
    abstract_model,
    assert_donated,
    donated_bytes,
    measure_stage,
    methods,
    target_named,
)
from emloc_jax.memory._emloc_stages import emulator_training
from emloc_jax.training import (
    init_state,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from tests.memory.models import batch_of, real, tiny

SETTING = Setting(batch_size=2, length=32, ratio=0.5, lora_rank=2, chunk=16)
# Of every kernel that is factored, a dozen programs are compiled; two make two kinds.
TWO = ("layers/self_attn/k_proj", "layers/mlp/down_proj")


def real_step(abstract, params):
    """What `finetune` runs, on real arrays: the step, and what it is called with."""
    free = {path: s for path, s in abstract.kernels.items() if path.startswith("layers")}
    adapters = init_adapters(jax.random.key(0), free, where=".*", rank=2, alpha=4.0)
    schedule = make_schedule(1e-3, steps=10, warmup=2)
    tx = make_optimizer(schedule)
    apply = intercept(abstract.model.apply)
    step = make_train_step(
        make_loss(apply, chunk=SETTING.chunk),
        tx,
        combine=lambda adapters, frozen, key: attach(frozen, adapters),
        schedule=schedule,
    )
    return step, (init_state(adapters, tx), params, batch_of(SETTING))


def real_emulator(abstract, params):
    kernels = {path: s for path, s in abstract.kernels.items() if path.startswith("layers")}
    noisy = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype), params
    )
    return compress(noisy, None, kernels=kernels, ratios=SETTING.ratio)[0]


@pytest.fixture(scope="module")
def emulated():
    """A model in bf16 and an emulator of it."""
    abstract = tiny("bfloat16")
    return abstract, real_emulator(abstract, real(abstract.params))


def test_a_planned_step_is_the_step_that_runs(emulated):
    abstract, params = emulated
    step, given = real_step(abstract, params)
    ran = analysed(step.lower(*given))
    (planned,) = Planner(abstract).stages(emulator_training, SETTING)
    assert planned.program == ran
    assert planned.device == ran.peak
    assert planned.parts["parameters"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_the_abstract_emulator_is_the_one_that_compress_makes(emulated):
    abstract, params = emulated
    made = flatten_leaves(params)
    planned = flatten_leaves(abstract_emulator(abstract, SETTING))
    assert {*made} == {*planned}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (made, planned))
    assert shapes[0] == shapes[1]


def test_the_real_step_takes_its_state_over():
    abstract = tiny()
    step, given = real_step(abstract, real(abstract.params))
    lowered = step.lower(*given)
    state = given[0]
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf is not state.rng]
    assert donated_bytes(lowered) == sum(leaf.nbytes for leaf in leaves) + 8  # and its key
    assert_donated(lowered)
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        lowered = jax.jit(lambda x: x[:4], donate_argnums=0).lower(np.ones(8, np.float32))
    with pytest.raises(PlanError, match="32 bytes are donated"):
        assert_donated(lowered)


def test_blocks_compose_to_the_whole_model():
    """A scanned program grows from block to block by no more than one block explains."""
    found = {}
    for layers in (4, 12):
        (found[layers],) = Planner(tiny(num_hidden_layers=layers)).plan(["lora"], SETTING).stages
    block = jax.tree.leaves(tiny(num_hidden_layers=1).params["layers"])
    adapters = (found[12].parts["trainables"] - found[4].parts["trainables"]) // 8
    arguments = sum(leaf.size * 4 for leaf in block) + 3 * adapters  # and Adam's two moments
    assert found[12].program.arguments - found[4].program.arguments == 8 * arguments
    # Gradients, and the input that a block is computed again from.
    kept = adapters + SETTING.batch_size * SETTING.length * 32 * 4
    grown = (found[12].device - found[4].device) // 8
    assert kept <= grown - arguments <= 1.5 * kept + adapters


def test_bf16_layers_are_not_copied_in_fp32():
    """Temporaries of a step must not hold the stack of all layers in another precision."""
    setting = SETTING.replace(length=8)
    short, deep = (
        Planner(tiny("bfloat16", num_hidden_layers=n, hidden_size=64, intermediate_size=128))
        .plan(["lora"], setting)
        .stages[0]
        for n in (2, 22)
    )
    layers = deep.parts["parameters"] - short.parts["parameters"]
    assert deep.parts["temporaries"] - short.parts["temporaries"] < 0.5 * layers


def test_every_method_has_stages_that_add_up():
    setting = SETTING.replace(calibration_rows=3, where=TWO, lora_where=TWO)
    plan = Planner(tiny("bfloat16")).plan(methods(), setting)
    assert [(s.method, s.name) for s in plan.stages] == [
        ("inference", "inference"),
        ("lora", "train"),
        ("streamed_lora", "train"),
        ("streamed_lora", "merge"),
        ("full", "train"),
        ("lsp", "train"),
        ("emloc", "calibrate"),
        ("emloc", "factorize"),
        ("emloc", "train"),
        ("emloc", "choose limit"),
        ("emloc", "correct"),
        ("emloc", "merge"),
    ]
    assert plan.device == max(s.device for s in plan.stages) == plan.obstacle.device
    figures = {(s.method, s.name): s for s in plan.stages}
    # Inputs of all 3 blocks of 3 rows of 32 tokens of 32 numbers in bf16; gradients in files.
    assert figures["emloc", "calibrate"].host["activations"] == 3 * 3 * 32 * 32 * 2
    assert figures["emloc", "calibrate"].disk == {"activations": 2 * 3 * 32 * 32 * 2}
    parameters = figures["inference", "inference"].parts["parameters"]
    assert figures["full", "train"].parts["trainables"] == 2 * parameters
    assert figures["emloc", "merge"].disk == {"merged model": parameters}
    for stage in plan.stages:
        assert all(size > 0 for size in stage.parts.values()), stage.parts


def test_what_stays_beside_a_stage_counts():
    abstract, target = tiny(), target_named()
    apart, beside = (
        next(emulator_training(abstract, SETTING.replace(stream=stream, weighted=True), target))
        for stream in (True, False)
    )
    specs = [s for path, s in abstract.kernels.items() if path.startswith("layers")]
    kernels = sum(np.prod(spec.shape) * 4 for spec in specs)
    leaders = {s.input_group: s.d_in for s in specs}.values()
    moments = 3 * 4 * (sum(d**2 for d in leaders) + sum(s.d_out**2 for s in specs) + len(leaders))
    assert apart.resident == {}
    # The other leaves are shared.
    assert beside.resident == {"original": kernels, "moments": moments}
    light = next(emulator_training(abstract, SETTING.replace(stream=False), target))
    assert light.resident == {"original": kernels}
    figures = ProgramMemory(arguments=10, outputs=4, temporaries=3, aliased=4)
    alone = dataclasses.replace(beside, programs={"step": Program(figures)})
    assert measure_stage(alone).device == 13 + sum(beside.resident.values())


def test_a_model_that_no_machine_holds_is_planned():
    wide = abstract_model(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024}
        | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4000}
        | {"num_attention_heads": 64, "num_key_value_heads": 8}
    )
    (stage,) = Planner(wide).plan(["inference"], Setting(length=8)).stages
    assert stage.parts["parameters"] == 2 * wide.parameters > 6e12


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: Setting(length=0), "length is 0"),
        (lambda: Setting(ratio=1.0), "strictly between"),
        (lambda: Setting(batch_size=3, accumulation=2), "multiple"),
        (lambda: Setting(calibration_batch=0), "at least one row"),
        (lambda: Setting(eval_batch=0), "at least one at a time"),
        (lambda: Setting(block_inputs="disk"), "pinned_host"),
        (lambda: Planner(tiny()).plan(["emlok"], SETTING), "known are"),
        (lambda: target_named("abacus"), "rtx4090"),
    ],
)
def test_what_cannot_be(action, words):
    with pytest.raises(ConfigError, match=words):
        action()
