"""The training step: exact accumulation, AdamW, clipping, refusals, keys, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emloc_jax.errors import ConfigError
from emloc_jax.training import (
    init_state,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
    pad_examples,
)
from tests.training.toy import Toy, toy_examples, toy_params

LOSS = make_loss(Toy().apply, chunk=16)


def toy_batch(count=8, seed=0):
    return pad_examples(toy_examples(count, seed=seed), batch_size=count, length=16)


def quadratic(params, batch):
    """Σ w (x·θ − y)² / 2, whose gradient is written down in `gradient64`."""
    error = batch["x"] @ params["theta"] - batch["y"]
    return jnp.sum(batch["w"] * error**2) / 2, jnp.sum(batch["w"])


def gradient64(theta, batch):
    x, y, w = (np.asarray(batch[k], np.float64) for k in ("x", "y", "w"))
    return x.T @ (w * (x @ theta - y)) / w.sum()


def regression(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(count, 3)).astype(np.float32),
        "y": rng.normal(size=count).astype(np.float32),
        "w": np.r_[np.ones(2), np.zeros(4), 0.3 + rng.random(count - 6)].astype(np.float32),
    }


def leaves_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_accumulation_equals_the_whole_batch_however_tokens_are_spread():
    batch, params = toy_batch(), toy_params()
    batch["weights"][:2] = 0  # one micro-batch without anything to learn
    results = {}
    for parts in (1, 4):
        tx = optax.sgd(1.0)
        step = make_train_step(LOSS, tx, accumulation=parts, clip=None)
        results[parts] = step(init_state(params, tx), None, batch)
    (one, one_metrics), (four, four_metrics) = results[1], results[4]
    leaves_close(one.trainables, four.trainables, atol=1e-6)
    for key in ("loss", "weight", "grad_norm"):
        np.testing.assert_allclose(one_metrics[key], four_metrics[key], rtol=1e-6)
    whole = jax.jit(jax.grad(lambda p: LOSS(p, batch)[0] / batch["weights"].sum()))(params)
    moved = jax.tree.map(jnp.subtract, params, one.trainables)
    leaves_close(moved, whole, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_adamw_with_schedule_clip_and_decay_against_float64(parts):
    peak, steps, warmup, clip, decay = 0.2, 6, 2, 0.5, 0.1
    schedule = make_schedule(peak, steps=steps, warmup=warmup, final=0.1)
    tx = make_optimizer(schedule, weight_decay=decay)
    step = make_train_step(quadratic, tx, accumulation=parts, clip=clip, schedule=schedule)
    theta = np.array([3.0, -2.0, 1.0])
    state = init_state({"theta": jnp.asarray(theta, jnp.float32)}, tx)
    mu = nu = np.zeros(3)
    for t in range(steps):
        batch = regression(seed=t)
        state, metrics = step(state, None, batch)
        gradient = gradient64(theta, batch)
        norm = np.linalg.norm(gradient)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        gradient = gradient * min(1, clip / norm)
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient**2
        if t < warmup:
            rate = peak * (t + 1) / warmup
        else:
            phase = np.cos(np.pi * (t - warmup) / (steps - warmup))
            rate = peak * (0.1 + 0.9 * (1 + phase) / 2)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        m, v = mu / (1 - 0.9 ** (t + 1)), nu / (1 - 0.999 ** (t + 1))
        theta = theta - rate * (m / (np.sqrt(v) + 1e-8) + decay * theta)
        np.testing.assert_allclose(state.trainables["theta"], theta, rtol=2e-5)
    assert int(state.step) == steps


def test_norm_scales_and_biases_do_not_decay_even_when_stacked():
    tx = make_optimizer(1.0, weight_decay=0.1)
    params = {
        "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3)), "scale": jnp.ones((4, 2))}
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert np.allclose(updates["a"]["kernel"], -0.1)
    assert not np.any(updates["a"]["bias"]) and not np.any(updates["a"]["scale"])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("poison", [np.nan, np.inf, "no weight"])
def test_a_step_that_is_not_finite_changes_only_counters(poison, parts):
    tx = make_optimizer(0.1)
    step = make_train_step(quadratic, tx, accumulation=parts)
    state, _ = step(init_state({"theta": jnp.ones(3)}, tx), None, regression())
    before = jax.tree.map(np.array, (state.trainables, state.opt_state))
    batch = regression()
    if poison == "no weight":
        batch["w"][:] = 0
    else:
        batch["y"][0] = poison
    state, metrics = step(state, None, batch)
    assert not metrics["finite"] and int(metrics["skipped"]) == int(state.skipped) == 1
    leaves_close(before, (state.trainables, state.opt_state), rtol=0)
    assert int(state.step) == 2
    _, metrics = step(state, None, regression())
    assert metrics["finite"]


def test_every_step_and_micro_batch_has_its_own_key():
    def combine(trainables, frozen, key):
        return {"noise": jax.random.uniform(key), "w": trainables["w"], "scale": frozen}

    def loss(params, batch):
        noise = params["noise"] * params["scale"]
        return noise * params["w"] * jnp.sum(batch["slot"]), jnp.float32(1)

    tx = optax.sgd(1.0)
    seen = []
    for parts, seed in ((3, 0), (3, 0), (3, 1)):
        step = make_train_step(loss, tx, combine=combine, accumulation=parts, clip=None)
        state = init_state({"w": jnp.ones(())}, tx, seed=seed)
        for _ in range(2):
            for micro in range(3):  # only this micro-batch counts, so its noise can be read
                batch = {"slot": np.eye(3, dtype=np.float32)[micro]}
                copy = jax.tree.map(jnp.copy, state)
                _, metrics = step(copy, jnp.float32(2.0), batch)
                seen.append(float(metrics["loss"]) * 3 / 2)
            state, _ = step(state, jnp.float32(2.0), {"slot": np.ones(3, np.float32)})
            state = init_state({"w": jnp.ones(())}, tx, seed=seed).replace(step=state.step)
    first, again, other = np.split(np.array(seen), 3)
    assert len(set(first)) == 6 and np.all((first >= 0) & (first < 1))
    assert (first == again).all()
    assert not np.intersect1d(first, other).size


def test_one_compilation_donated_state_and_no_constants():
    traces = []

    def combine(adapters, frozen, key):
        traces.append(1)
        return frozen | {"head": {"kernel": frozen["head"]["kernel"] + adapters["delta"]}}

    params = toy_params()
    params["head"]["kernel"] = jnp.asarray(params["head"]["kernel"])
    adapters = {"delta": jnp.zeros(params["head"]["kernel"].shape)}
    tx = make_optimizer(make_schedule(0.1, steps=5, warmup=2))
    step = make_train_step(LOSS, tx, combine=combine, accumulation=2)
    state = init_state(adapters, tx)
    compiled = step.lower(state, params, toy_batch()).compile()
    donated = sum(x.nbytes for x in jax.tree.leaves((state.trainables, state.opt_state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= donated
    assert step.trace(state, params, toy_batch()).jaxpr.consts == []
    count = len(traces)
    for seed in range(3):
        old = state
        state, metrics = step(state, params, toy_batch(seed=seed))
        assert old.trainables["delta"].is_deleted()
    assert len(traces) <= count + 1 and step._cache_size() == 1
    assert not adapters["delta"].is_deleted(), "the caller's own arrays are left alone"
    assert not params["head"]["kernel"].is_deleted()
    assert metrics["finite"]


def test_bf16_trainables_keep_their_dtype():
    tx = make_optimizer(0.1)
    step = make_train_step(quadratic, tx, accumulation=2)
    state = init_state({"theta": jnp.ones(3, jnp.bfloat16)}, tx)
    for _ in range(2):
        state, _ = step(state, None, regression())
    assert state.trainables["theta"].dtype == jnp.bfloat16
    assert step._cache_size() == 1


def test_impossible_requests():
    tx = optax.sgd(1.0)
    for wrong in ({"accumulation": 0}, {"clip": 0.0}):
        with pytest.raises(ConfigError, match="accumulation is"):
            make_train_step(quadratic, tx, **wrong)
    step = make_train_step(quadratic, tx, accumulation=5)
    with pytest.raises(ConfigError, match="12 sequences cannot be cut into 5"):
        step(init_state({"theta": jnp.ones(3)}, tx), None, regression())
    for wrong in ({"steps": 2, "warmup": 2}, {"steps": 2, "final": 1.5}):
        with pytest.raises(ConfigError, match="warm-up"):
            make_schedule(0.1, **wrong)
    with pytest.raises(ConfigError, match="positive"):
        make_optimizer(0.0)
    with pytest.raises(ConfigError, match="decay"):
        make_optimizer(0.1, weight_decay=-1.0)


def test_a_step_can_be_part_of_another_program():
    tx = make_optimizer(0.1)
    step, theta = make_train_step(quadratic, tx), {"theta": jnp.ones(3)}
    alone = init_state(theta, tx)
    for _ in range(3):
        alone, metrics = step(alone, None, regression())

    def body(state, batch):
        return step(state, None, batch)

    batches = jax.tree.map(lambda x: np.stack([x] * 3), regression())
    inside, losses = jax.jit(lambda s, b: jax.lax.scan(body, s, b))(init_state(theta, tx), batches)
    np.testing.assert_allclose(losses["loss"][-1], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(inside.trainables["theta"], alone.trainables["theta"], rtol=1e-5)


@pytest.mark.parametrize("copy", [True, False])
def test_a_state_copies_what_it_is_given_unless_told_not_to(copy):
    tx = optax.sgd(0.5)
    given = {"w": jnp.ones(3), "b": np.ones(2, np.float32)}
    state = init_state(given, tx, copy=copy)
    step = make_train_step(
        lambda p, batch: (jnp.sum(p["w"]) + jnp.sum(p["b"]), jnp.ones(())), tx, clip=None
    )
    state, _ = step(state, None, {"x": np.ones((1,), np.float32)})
    assert given["w"].is_deleted() != copy
    np.testing.assert_array_equal(given["b"], 1)  # NumPy's memory is nobody's to take
    np.testing.assert_allclose(state.trainables["w"], 0.5)
