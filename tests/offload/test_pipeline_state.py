"""A saved trainer goes on bit for bit, and saving or evaluating changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.kernels import cache
from emloc_jax.offload import FitOptions, PipelineOptions, _fresh_pairs
from tests.offload.pipeline_model import batch_of, tiny_model
from tests.offload.test_pipeline import assert_same_bits, make_trainer

# One fit to compile.
RULES = (("layers/mlp/down_proj/kernel", "subspace"), (".*/scale", "device"), (".*", "host"))


def copy(tree):
    return jax.tree.map(np.array, tree)


def go_on(trainer, steps):
    for step in steps:
        trainer.step(batch_of(step))


@pytest.mark.parametrize("rounding", ["stochastic", pytest.param("kahan", marks=pytest.mark.slow)])
def test_state_and_load_go_on_bit_for_bit(rounding):
    model, params = tiny_model(dtype=jnp.bfloat16)
    options = PipelineOptions(
        learning_rate=1e-3,
        train=RULES,
        subspace=0.5,
        nnz=2,
        fit=FitOptions(steps=5, threshold=0.05),
        refit_every=4,
        rounding=rounding,
    )
    with (
        make_trainer(model, params, schedule="lsp", options=options) as first,
        make_trainer(model, params, schedule="lsp", options=options) as second,
    ):
        go_on(first, range(5))
        saved = copy(first.state())
        go_on(first, range(5, 9))
        second.load(saved)
        go_on(second, range(5, 9))
        assert_same_bits(copy(second.params()), copy(first.params()))


def test_saving_and_evaluating_leave_a_delayed_run_as_it_is():
    """Its last update has arrived and waits; it is saved, and applied when its time comes."""
    model, params = tiny_model(dtype=jnp.bfloat16)
    options = PipelineOptions(
        learning_rate=1e-2,
        train=(("layers/mlp/down_proj/kernel", "host"), (".*/scale", "device")),
        rounding="stochastic",
        wire="bfloat16",
    )

    quiet, watched = (
        make_trainer(model, params, schedule="offload_delayed", options=options) for _ in range(2)
    )
    with quiet, watched:
        assert not any(held["waits"] for held in watched.state().held)
        go_on(quiet, range(6))
        whole = copy(quiet.params())
        for step in range(3):
            go_on(watched, [step])
            seen, saved = copy(watched.params()), copy(watched.state())
        assert [bool(held["waits"]) for held in saved.held] == [False, True, True]
        inside, trained = saved.blocks[1]["params"], seen["layers"]["1"]
        kernels = [tree["mlp"]["down_proj"]["kernel"] for tree in (inside, trained)]
        assert np.any(kernels[0] != kernels[1])  # evaluated is what the run would end with here
        go_on(watched, range(3, 6))
        assert_same_bits(copy(watched.params()), whole)
        quiet.load(saved)
        assert_same_bits(copy(quiet.params()), seen)
        go_on(quiet, range(3, 6))
        assert_same_bits(copy(quiet.params()), whole)


def test_the_measured_choice_of_products_is_kept(monkeypatch):
    model, params = tiny_model()
    options = PipelineOptions(
        learning_rate=1e-2,
        train=(("layers/mlp/down_proj/kernel", "subspace"),),
        subspace=0.5,
        nnz=2,
        fit=FitOptions(steps=3, threshold=0.05),
        product="auto",
    )
    asked = []

    def make(dense):
        def measured(p, tokens, dtype):
            asked.append((p.d, tokens, dtype))
            return cache(p) if p.d == dense else p

        monkeypatch.setattr(_fresh_pairs, "faster_products", measured)
        return make_trainer(model, params, schedule="lsp", options=options)

    with make(dense=24) as first, make(dense=16) as resumed:  # another day, another clock
        assert asked[:2] == [(24, 24, jnp.float32), (16, 24, jnp.float32)]  # once for each size
        go_on(first, range(2))
        saved = copy(first.state())
        pair = saved.blocks[0]["pairs"]["mlp/down_proj/kernel"]
        assert all(p.cached is None for p in pair)  # a copy follows from the rest
        go_on(first, range(2, 4))
        resumed.load(saved)
        for block in resumed.state().blocks:
            assert block["cached"]["mlp/down_proj/kernel"].tolist() == [True, False]
        go_on(resumed, range(2, 4))
        assert_same_bits(copy(resumed.params()), copy(first.params()))
