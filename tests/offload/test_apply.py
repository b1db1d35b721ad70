"""Updates of kernels from their subspace: the sum, its rounding, and that it is made in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, ProjectorError
from emloc_jax.kernels import (
    Layout,
    cache,
    dense_projector,
    identity_projector,
    make_projector,
    stack_projectors,
    to_dense,
)
from emloc_jax.offload import _apply, apply_update, rounding_state

STEP = 2.0**-10  # an eighth of bf16's last bit just above 1


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def dense64(p, d):
    return np.eye(d) if p is None else np.asarray(to_dense(p), np.float64)


# Stored shape, layout, and how the kernel's matrix is read from the stored array by hand.
STORED = {
    "dense": ((12, 10), Layout(), lambda k: k),
    "heads_out": ((12, 2, 5), Layout(1, 2), lambda k: k.reshape(12, 10)),
    "heads_in": ((3, 4, 10), Layout(2, 1), lambda k: k.reshape(12, 10)),
    "table": ((10, 12), Layout(perm=(1, 0)), lambda k: k.T),
    "outputs_first": ((10, 3, 4), Layout(2, 1, (1, 2, 0)), lambda k: k.reshape(10, 12).T),
    "interleaved": (
        (2, 12, 5),
        Layout(1, 2, (1, 0, 2)),
        lambda k: k.swapaxes(0, 1).reshape(12, 10),
    ),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("block", [2**22, 36])  # all rows at once; three at a time
def test_update_equals_the_dense_formula(stored, block, monkeypatch):
    monkeypatch.setattr(_apply, "_BLOCK", block)
    shape, layout, matrix = STORED[stored]
    kernel, delta = normal(0, *shape), normal(1, 7, 4)
    p, q = make_projector(0, 12, 7, 3, law="normal"), make_projector(1, 10, 4, 2)

    @jax.jit
    def update(kernel, delta, p, q, decay):
        return apply_update(kernel, delta, p, q, decay=decay, layout=layout)[0]

    arguments = (jnp.asarray(kernel, jnp.float32), jnp.asarray(delta, jnp.float32), p, q, 0.25)
    want = 0.75 * matrix(kernel) + dense64(p, 12) @ delta @ dense64(q, 10).T
    got = update(*arguments)
    assert got.shape == shape
    np.testing.assert_allclose(matrix(np.asarray(got)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (None, None),
        (None, make_projector(0, 10, 4, 2)),
        (make_projector(0, 12, 7, 3), None),
        (cache(make_projector(0, 12, 7, 3)), cache(make_projector(1, 10, 4, 2))),
        (dense_projector(normal(2, 12, 5)), identity_projector(10)),
    ],
    ids=["none", "out", "in", "cached", "dense"],
)
def test_sides_may_be_uncompressed_or_dense(p, q):
    kernel, sizes = normal(0, 12, 10), (12 if p is None else p.size, 10 if q is None else q.size)
    delta = normal(1, *sizes)
    want = kernel + dense64(p, 12) @ delta @ dense64(q, 10).T
    got, extra = jax.jit(apply_update)(
        *(jnp.asarray(a, jnp.float32) for a in (kernel, delta)), p, q
    )
    assert extra is None
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_stacked_kernels_are_updated_layer_by_layer(rounding):
    ps = [make_projector(i, 12, 7, 3) for i in range(3)]
    qs = [make_projector(9 + i, 10, 4, 2) for i in range(3)]
    kernel = jnp.asarray(normal(0, 3, 12, 2, 5), jnp.bfloat16)
    delta = jnp.asarray(normal(1, 3, 7, 4), jnp.float32)
    new, extra = jax.jit(
        lambda kernel, delta, p, q: apply_update(
            kernel,
            delta,
            p,
            q,
            layout=Layout(1, 2),
            rounding=rounding,
            extra=rounding_state(kernel, rounding),
            key=jax.random.key(0),
        )
    )(kernel, delta, stack_projectors(ps), stack_projectors(qs))
    got = np.asarray(new, np.float64)
    if extra is not None:
        got = got + np.asarray(extra, np.float64)
    for i, (p, q) in enumerate(zip(ps, qs, strict=True)):
        lifted = dense64(p, 12) @ np.asarray(delta[i], np.float64) @ dense64(q, 10).T
        want = np.asarray(kernel[i], np.float64) + lifted.reshape(12, 2, 5)
        relative = {"nearest": 2**-8, "stochastic": 2**-7, "kahan": 2**-15}[rounding]
        np.testing.assert_allclose(got[i], want, rtol=relative, atol=relative)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "master"])
def test_donated_kernels_are_updated_in_place(rounding, dtype, monkeypatch):
    monkeypatch.setattr(_apply, "_BLOCK", 2**12)
    d_in, d_out, size = 256, 320, 8
    kernel = jax.ShapeDtypeStruct((d_in, d_out), dtype)
    extra = jax.eval_shape(lambda k: rounding_state(k, rounding), kernel)
    p, q = make_projector(0, d_in, size, 4), make_projector(1, d_out, size, 4)

    def update(kernel, extra, delta, p, q, key):
        return apply_update(kernel, delta, p, q, rounding=rounding, extra=extra, key=key)

    program = jax.jit(update, donate_argnums=(0, 1)).lower(
        kernel, extra, jnp.zeros((size, size)), p, q, jax.random.key(0)
    )
    memory = program.compile().memory_analysis()
    width = dtype.dtype.itemsize + (0 if extra is None else extra.dtype.itemsize)
    assert memory.alias_size_in_bytes == width * d_in * d_out
    if dtype == jnp.float32:  # the CPU backend computes slices of bf16 in fp32, on a copy
        assert memory.temp_size_in_bytes < 0.4 * 4 * d_in * d_out


def repeated(rounding, steps, kernel, delta, dtype=jnp.bfloat16):
    """The kernel, and what kernel and `extra` stand for, after equal uncompressed steps."""
    kernel = jnp.full((64, 64), kernel, dtype)
    delta = jnp.full((64, 64), delta, jnp.float32)

    def step(i, state):
        key = jax.random.fold_in(jax.random.key(0), i)
        return apply_update(state[0], delta, None, None, rounding=rounding, extra=state[1], key=key)

    @jax.jit
    def run(kernel):
        return jax.lax.fori_loop(0, steps, step, (kernel, rounding_state(kernel, rounding)))

    new, extra = run(kernel)
    new = np.asarray(new, np.float64)
    if rounding == "kahan":
        return new, new + np.asarray(extra, np.float64)
    return new, new if extra is None else np.asarray(extra, np.float64)


@pytest.mark.parametrize("sign", [1, -1])
def test_steps_below_half_a_bit_are_not_lost(sign):
    steps = 60
    want = sign * (1 + steps * STEP)
    new, _ = repeated("nearest", steps, sign, sign * STEP)
    assert np.all(new == sign)  # what the others must not do
    for rounding in ("kahan", "master"):
        new, exact = repeated(rounding, steps, sign, sign * STEP)
        np.testing.assert_array_equal(exact, want)
        assert np.all(np.abs(new - want) <= 2**-8)  # the kernel is the nearest bf16
    new, _ = repeated("stochastic", steps, sign, sign * STEP)
    # Each step rounds up with probability 1/8, by 2^-7: within 5 standard errors of the mean.
    error = 2**-7 * np.sqrt(steps * 1 / 8 * 7 / 8 / new.size)
    assert abs(new.mean() - want) < 5 * error
    assert new.std() > 0


def test_stochastic_rounding_goes_to_neighbours_and_keeps_the_rest():
    exact = jnp.concatenate([jnp.asarray(normal(0, 500) * 10.0 ** np.arange(-10, 10).repeat(25))])
    exact = jnp.asarray(exact, jnp.float32).at[:4].set(jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0]))
    zeros = jnp.zeros((1, 500), jnp.bfloat16)

    @jax.jit
    def round_(key):
        return apply_update(zeros, exact[None], None, None, rounding="stochastic", key=key)[0][0]

    got = np.asarray(round_(jax.random.key(0)), np.float32)
    np.testing.assert_array_equal(got, np.asarray(round_(jax.random.key(0)), np.float32))
    assert np.any(got[4:] != np.asarray(round_(jax.random.key(1)), np.float32)[4:])
    np.testing.assert_array_equal(got[:4], [np.inf, -np.inf, np.nan, 0.0])
    bits = np.asarray(exact).view(np.uint32)[4:] & np.uint32(0xFFFF0000)
    down, up = bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)
    assert np.all((got[4:] == down) | (got[4:] == up))
    representable = jnp.asarray(down, jnp.bfloat16)[None]
    kept, _ = apply_update(
        representable, jnp.zeros((1, 496)), None, None, rounding="stochastic", key=jax.random.key(0)
    )
    np.testing.assert_array_equal(kept, representable)


def test_a_master_copy_is_a_run_in_fp32():
    p, q = make_projector(0, 12, 7, 3, law="normal"), make_projector(1, 10, 4, 2)
    start = jnp.asarray(normal(0, 12, 10), jnp.bfloat16)
    kernel, master, single = start, rounding_state(start, "master"), start.astype(jnp.float32)

    @jax.jit
    def step(kernel, master, single, delta):
        kernel, master = apply_update(
            kernel, delta, p, q, decay=1e-2, rounding="master", extra=master
        )
        return kernel, master, apply_update(single, delta, p, q, decay=1e-2)[0]

    for i in range(10):
        delta = jnp.asarray(1e-3 * normal(i, 7, 4), jnp.float32)
        kernel, master, single = step(kernel, master, single, delta)
        np.testing.assert_array_equal(master, single)
        np.testing.assert_array_equal(kernel, single.astype(jnp.bfloat16))


def test_compensation_follows_the_exact_sum():
    exact = np.asarray(jnp.asarray(normal(0, 8, 8), jnp.bfloat16), np.float64)
    kernel = jnp.asarray(exact, jnp.bfloat16)
    for dtype, relative in ((jnp.bfloat16, 2**-13), (jnp.float32, 2**-19)):
        new, extra, want = kernel, jnp.zeros((8, 8), dtype), exact
        step = jax.jit(
            lambda k, e, d: apply_update(k, d, None, None, decay=1e-3, rounding="kahan", extra=e)
        )
        for i in range(50):
            delta = np.float32(1e-3 * normal(i, 8, 8))
            new, extra = step(new, extra, delta)
            want = (1 - 1e-3) * want + delta
        assert extra.dtype == dtype
        got = np.asarray(new, np.float64) + np.asarray(extra, np.float64)
        np.testing.assert_allclose(got, want, rtol=relative, atol=relative)
        assert np.abs(np.asarray(new, np.float64) - want).max() < 2**-7 * np.abs(want).max()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rounding": "up"}, ConfigError, "'up'.*'nearest'"),
        ({"rounding": "stochastic"}, ConfigError, "PRNG key"),
        ({"rounding": "kahan"}, ConfigError, "rounding_state"),
        ({"rounding": "master", "extra": jnp.zeros((2, 2))}, ConfigError, r"\(6, 4\).*\(2, 2\)"),
        ({"rounding": "master", "extra": jnp.zeros((6, 4), jnp.bfloat16)}, ConfigError, "bfloat16"),
        ({"extra": jnp.zeros((6, 4))}, ConfigError, "keeps nothing"),
        (
            {"kernel": jnp.zeros((6, 4), jnp.float16), "rounding": "stochastic"}
            | {"key": jax.random.key(0)},
            ConfigError,
            "float16",
        ),
        ({"delta": jnp.zeros((3, 3))}, ProjectorError, r"\(3, 3\).*\(3, 4\)"),
        ({"p": make_projector(0, 5, 3, 2)}, ProjectorError, r"`p`.*\(5,\).*\(6, 4\)"),
        ({"kernel": jnp.zeros((2, 6, 4))}, ProjectorError, r"\(2, 6, 4\).*stacked"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    arguments = {
        "kernel": jnp.zeros((6, 4), jnp.bfloat16),
        "delta": jnp.zeros((3, 4)),
        "p": make_projector(0, 6, 3, 2),
        "q": None,
    }
    with pytest.raises(error, match=match):
        apply_update(**(arguments | change))
