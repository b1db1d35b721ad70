"""`lsp_adamw` under accumulation, shardings, memory kinds and low precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emloc_jax.kernels import get_leaf
from tests.offload.lsp_case import close, compressing, random_tree, stepper


@functools.cache
def plain_run():
    """Two steps on one device."""
    tx, params = compressing(where="layers/.*"), random_tree(0)
    state, step = tx.init(params), stepper(tx)
    for i in range(2):
        params, state = step(random_tree(i + 1), state, params)
    return params, state


def test_four_accumulated_steps_are_one_big_one():
    tx = compressing(where="mix", weight_decay=0.1, clip=1.0)
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    params = random_tree(0)
    small, state, big, big_state = params, multi.init(params), params, tx.init(params)
    step, big_step = stepper(multi), stepper(tx)
    for i in range(2):
        parts = [random_tree(10 * i + k + 1) for k in range(4)]
        for part in parts:
            small, state = step(part, state, small, refit=state.mini_step == 3)
        mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
        big, big_state = big_step(mean, big_state, big)
        close(small, big, 1e-5)
    assert int(state.inner_opt_state.count) == 2
    close(state.inner_opt_state.errors, big_state.errors, 1e-4)


def test_sharded_parameters_give_the_same_steps():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    place = {"layers": {"up": {"kernel": PartitionSpec(None, None, "x")}},
             "mix": {"kernel": PartitionSpec(None, "x")}, "bias": PartitionSpec()}  # fmt: skip
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), place, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )
    tx, params = compressing(where="layers/.*"), jax.device_put(random_tree(0), shardings)
    state, step = tx.init(params), stepper(tx)
    for i in range(2):
        params, state = step(jax.device_put(random_tree(i + 1), shardings), state, params)
    expected, other = plain_run()
    close(params, expected, 1e-5)
    close(state.moments, other.moments, 1e-5)
    assert get_leaf(params, "mix/kernel").sharding.num_devices == 2


def test_moments_can_rest_in_pinned_host_memory():
    """As far as the CPU backend has memory kinds; a GPU is where it matters."""
    tx = compressing(where="layers/.*", memory_kind="pinned_host")
    params = random_tree(0)
    state, step = tx.init(params), stepper(tx)
    for i in range(2):
        for moments in (*state.moments.values(), *state.dense.values()):
            kinds = [array.sharding.memory_kind for array in (moments.mu, moments.nu)]
            assert kinds == ["pinned_host", "pinned_host"]
            assert moments.count.sharding.memory_kind == "device"
        params, state = step(random_tree(i + 1), state, params)
    assert state.dense["mix/kernel"].mu.sharding.memory_kind == "pinned_host"
    close(params, plain_run()[0], 1e-6)


def test_bf16_parameters_projectors_and_moments():
    tx = compressing(
        where="mix", state_dtype=jnp.bfloat16, projector_dtype=jnp.bfloat16, weight_decay=0.1
    )
    params = random_tree(0, dtype=jnp.bfloat16)
    updates, state = jax.jit(tx.update)(random_tree(1, dtype=jnp.bfloat16), tx.init(params), params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    assert state.moments["mix/kernel"].nu.dtype == jnp.bfloat16
    assert state.projectors["mix/kernel"][0].values.dtype == jnp.bfloat16
    assert state.errors["mix/kernel"] < 1.5
    assert all(np.all(np.isfinite(np.asarray(u, np.float32))) for u in jax.tree.leaves(updates))
