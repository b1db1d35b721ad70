import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.kernels import identity_projector
from emloc_jax.offload._adam import init_moments
from emloc_jax.offload._transport import transport
from tests.offload.gradients import dense, pair, stacked


def random_moments(shape, seed=0):
    rng = np.random.default_rng(seed)
    mu = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    nu = jnp.asarray(rng.uniform(0.1, 2.0, shape), jnp.float32)
    return init_moments(shape).replace(mu=mu, nu=nu, count=jnp.int32(7))


OLD, NEW = pair(20, 14, 8, 6, nnz=3), pair(20, 14, 10, 5, nnz=3, seed=5)


@pytest.mark.parametrize("old, new", [
    (OLD, NEW),
    (OLD, (None, NEW[1])),
    ((None, OLD[1]), NEW),
    ((None, OLD[1]), (None, NEW[1])),
    ((OLD[0], None), (NEW[0], None)),
])  # fmt: skip
def test_mu_is_the_lifted_mean_compressed_again(old, new):
    shape = tuple(d if x is None else x.size for x, d in zip(old, (20, 14), strict=True))
    moments = random_moments(shape)
    moved = transport(moments, old=old, new=new)
    (p, q), (p2, q2) = [(dense(x[0], 20), dense(x[1], 14)) for x in (old, new)]
    lifted = p @ np.asarray(moments.mu, np.float64) @ q.T
    np.testing.assert_allclose(moved.mu, p2.T @ lifted @ q2, rtol=1e-4, atol=1e-4)
    squares = (p2.T @ p) ** 2 @ np.asarray(moments.nu, np.float64) @ ((q2.T @ q) ** 2).T
    np.testing.assert_allclose(moved.nu, squares, rtol=1e-5)
    assert np.all(moved.nu >= 0) and int(moved.count) == 7


def test_nu_is_the_second_moment_of_independent_entries():
    old, new = pair(10, 8, 4, 3), pair(10, 8, 5, 3, seed=9)
    nu = np.random.default_rng(0).uniform(0.1, 2.0, (4, 3))
    moments = init_moments((4, 3)).replace(nu=jnp.asarray(nu, jnp.float32))
    moved = np.asarray(transport(moments, old=old, new=new).nu)
    draws = np.random.default_rng(1).standard_normal((40_000, 4, 3)) * np.sqrt(nu)
    a, b = dense(new[0]).T @ dense(old[0]), dense(new[1]).T @ dense(old[1])
    measured = np.mean((a @ draws @ b.T) ** 2, axis=0)
    np.testing.assert_allclose(moved, measured, rtol=0.05)


def test_between_permutations_moments_only_change_places():
    moments = random_moments((6, 4))
    first = (identity_projector(6), identity_projector(4))
    order_in, order_out = [3, 1, 0, 5, 4, 2], [2, 0, 3, 1]
    second = (identity_projector(6, order_in), identity_projector(4, order_out))
    same = transport(moments, old=first, new=first)
    there = transport(moments, old=first, new=second)
    back = transport(there, old=second, new=first)
    for result in (same, back):
        np.testing.assert_array_equal(result.mu, moments.mu)
        np.testing.assert_array_equal(result.nu, moments.nu)
    where = np.argsort(order_in)[:, None], np.argsort(order_out)[None, :]
    np.testing.assert_array_equal(there.nu, np.asarray(moments.nu)[where])


def test_stacked_layers_and_bf16():
    moments = [random_moments((8, 6), seed=i) for i in range(2)]
    both = jax.tree.map(lambda *x: jnp.stack(x).astype(jnp.bfloat16), *moments)
    both = both.replace(count=jnp.int32(7))
    old, new = ((stacked(x[0], x[0]), stacked(x[1], x[1])) for x in (OLD, NEW))
    moved = jax.jit(transport)(both, old=old, new=new)
    assert moved.mu.shape == (2, 10, 5) and moved.mu.dtype == jnp.bfloat16
    for i, one in enumerate(moments):
        expected = transport(one, old=OLD, new=NEW)
        np.testing.assert_allclose(
            np.asarray(moved.nu[i], np.float32), expected.nu, rtol=2e-2, atol=1e-2
        )
