"""What the pipelined trainer refuses, and what it skips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import (
    ConfigError,
    DataError,
    EmlocError,
    NonFiniteError,
    PlanError,
    ProjectorError,
    ResumeError,
    UnmatchedRuleError,
    UnsupportedKernelError,
)
from emloc_jax.offload import (
    FitOptions,
    PipelinedTrainer,
    PipelineOptions,
    _fresh_pairs,
    _host_memory,
)
from tests.offload.pipeline_model import batch_of, head_loss, make_stack, tiny_model

MODEL, PARAMS = tiny_model()
# Few shapes to compress, so few fits to compile.
QUICK = PipelineOptions(
    train=(("layers/mlp/down_proj/kernel", "subspace"), (".*/scale", "device")),
    subspace=0.5,
    nnz=2,
    fit=FitOptions(steps=2),
)


def make(schedule="lsp", calibration=batch_of, **options):
    return PipelinedTrainer(
        make_stack(MODEL),
        PARAMS,
        head_loss(MODEL),
        batch_of(0),
        schedule=schedule,
        options=dataclasses.replace(QUICK, **options),
        calibration=calibration,
        overlap=False,
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"nnz": 5, "subspace": 4}, ProjectorError, "nnz"),
        ({"subspace": 17}, ProjectorError, "Choose at most"),
        ({"subspace": 1.5}, EmlocError, "fraction"),
        ({"train": ((".*/kernle", "subspace"),)}, UnmatchedRuleError, "kernle"),
        ({"train": ((".*/kernel", "compress"),)}, ConfigError, "compress"),
        ({"train": ((".*", "frozen"),)}, ConfigError, "frozen"),
        ({"train": ((".*/scale", "subspace"),)}, UnsupportedKernelError, "scale"),
        ({"host_memory": 1000}, PlanError, "1e-06 GB"),
        ({"train": (("embed_tokens/.*", "subspace"),)}, UnsupportedKernelError, "embed_tokens"),
    ],
)
def test_options_that_do_not_fit_the_model(options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulation": 0},
        {"refit_every": 0},
        {"clip": 0.0},
        {"product": "fast"},
        {"wire": "float8"},
    ],
)
def test_impossible_options(options):
    with pytest.raises(ConfigError):
        dataclasses.replace(QUICK, **options)


def test_an_unknown_schedule():
    with pytest.raises(ConfigError, match="there are native, offload"):
        make("zero")


def test_a_model_without_a_block_stack():
    with pytest.raises(ConfigError, match="BlockStack"):
        PipelinedTrainer(MODEL, PARAMS, head_loss(MODEL), batch_of(0), schedule="native")


def test_compression_needs_calibration():
    with pytest.raises(ConfigError, match="calibration"):
        make(calibration=None)


def test_an_empty_calibration_batch():
    empty = batch_of(0) | {"weights": np.zeros((4, 6), np.float32)}
    trainer = make(calibration=lambda step: empty)
    with pytest.raises(DataError, match="before step 1"):
        trainer.step(batch_of(0))


def test_a_calibration_that_is_not_finite():
    poisoned = batch_of(0) | {"weights": np.full((4, 6), np.inf, np.float32)}
    trainer = make(calibration=lambda step: poisoned)
    with pytest.raises(NonFiniteError, match="calibration"):
        trainer.step(batch_of(0))


def test_a_batch_without_weight_and_one_that_cannot_be_cut():
    trainer = make("native", accumulation=3)
    with pytest.raises(ConfigError, match="3 equal"):
        trainer.step(batch_of(0))
    with pytest.raises(DataError, match="no token"):
        trainer.step(batch_of(0, rows=3) | {"weights": np.zeros((3, 6), np.float32)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subspace": 0.25}, "other options"),
        ({"nnz": 3}, "other options"),
        ({"seed": 1}, "other projectors .* 4 of 4 .*mlp/down_proj"),  # of equal shapes
    ],
)
def test_a_state_of_other_projectors_is_refused(options, words):
    trainer = make()
    before = jax.tree.map(np.array, trainer.state())
    with pytest.raises(ResumeError, match=words):
        trainer.load(make(**options).state())
    jax.tree.map(np.testing.assert_array_equal, trainer.state(), before)


def test_host_memory_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    def draw(*args, **kwargs):
        raise AssertionError("projectors were drawn")

    monkeypatch.setattr(_fresh_pairs, "make_pairs", draw)
    said = tmp_path / "meminfo"
    said.write_text("MemTotal: 9999999 kB\nMemAvailable:       1 kB\n")
    monkeypatch.setattr(_host_memory, "_MEMINFO", said)
    with pytest.raises(PlanError, match="1.54e-06 GB on the host, and 1.02e-06 GB is free there"):
        make()  # two kernels with cores of (12, 8), two moments of fp32
    with pytest.raises(PlanError, match="host_memory"):
        make(host_memory=1535)
    with pytest.raises(AssertionError, match="drawn"):
        make(host_memory=1536)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(clip):
    trainer = make(clip=clip)
    trainer.step(batch_of(1))
    before = jax.tree.map(np.array, trainer.state())
    weights = np.ones((4, 6), np.float32)
    weights[0, 0] = np.inf
    metrics = trainer.step(batch_of(2) | {"weights": weights})
    assert not metrics["finite"] and metrics["skipped"] == 1
    after = jax.tree.map(np.array, trainer.state())
    jax.tree.map(
        np.testing.assert_array_equal,
        (before.outer, before.blocks),
        (after.outer, after.blocks),
    )
    assert trainer.step(batch_of(3))["finite"]


def test_an_error_on_a_lane_comes_out_of_the_next_step():
    class BrokenLink:
        def to_host(self, tree):
            raise OSError("the link is gone")

        def to_device(self, tree):
            return tree

    trainer = PipelinedTrainer(
        make_stack(MODEL),
        PARAMS,
        head_loss(MODEL),
        batch_of(0),
        schedule="layerwise",
        options=QUICK,
        link=BrokenLink(),
    )
    with pytest.raises(OSError, match="the link is gone"):
        trainer.step(batch_of(0))
        trainer.step(batch_of(1))
    for ask in (trainer.drain, trainer.state, trainer.params, trainer.close):
        with pytest.raises(OSError, match="the link is gone"):  # and nothing waits for ever
            ask()


@pytest.mark.parametrize("schedule", ["native", "offload"])
def test_an_interrupted_step_leaves_nobody_waiting(schedule):
    """With clipping, updates wait for the end of a backward pass that never comes."""

    def interrupt(lane, step, block, name):
        if (lane, block, name) == ("device", 0, "backward"):
            raise KeyboardInterrupt
        return 0.0

    trainer = PipelinedTrainer(
        make_stack(MODEL),
        PARAMS,
        head_loss(MODEL),
        batch_of(0),
        schedule=schedule,
        options=dataclasses.replace(QUICK, clip=1.0),
        delay=interrupt,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.step(batch_of(0))
    with pytest.raises(KeyboardInterrupt):
        trainer.close()


def test_parameters_given_are_not_consumed():
    trainer = make("native", learning_rate=0.1)
    trainer.step(batch_of(0))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(PARAMS))
