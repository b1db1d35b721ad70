"""Sparse projectors: what they promise, and their products against float64 dense references."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.errors import ProjectorError
from emloc_jax.kernels import (
    SparseProjector,
    _projector_choice,
    cache,
    cross,
    dense_projector,
    faster_products,
    gram,
    identity_projector,
    lift,
    lift_matrix,
    lift_rows,
    make_projector,
    project,
    project_matrix,
    stack_projectors,
    to_dense,
    uncache,
    with_values,
)
from emloc_jax.kernels._projector import _balanced_positions

SHAPES = [(1, 1, 1), (6, 4, 2), (13, 5, 3), (9, 9, 9), (48, 24, 4), (40, 40, 1), (33, 32, 20)]


def dense64(p):
    """The matrix in float64, built entry by entry from the positions."""
    rows, columns = np.asarray(p.values).astype(np.float64), np.asarray(p.indices)
    matrix = np.zeros((p.d, p.size))
    for i in range(p.d):
        for k in range(p.nnz):
            matrix[i, columns[i, k]] += rows[i, k]
    return matrix


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("d", "size", "nnz"), [*SHAPES, (300, 257, 2), (700, 300, 7)])
def test_rows_are_distinct_and_columns_balanced(d, size, nnz):
    for seed in range(3):
        p = make_projector(seed, d, size, nnz)
        assert (p.d, p.size, p.nnz) == (d, size, nnz)
        indices = np.asarray(p.indices)
        assert all(len(set(row)) == nnz for row in indices.tolist())
        loads = np.bincount(indices.ravel(), minlength=size)
        assert len(loads) == size
        assert loads.max() - loads.min() <= 1
        slots = np.asarray(p.slots)
        assert slots.shape == (size, -(-d * nnz // size))
        for column, flat in enumerate(slots):
            own = flat[flat < d * nnz]
            assert sorted(own) == np.flatnonzero(indices.ravel() == column).tolist()


def test_positions_are_random():
    # Each column is as likely in any row: over many draws the counts are within 5 sigma.
    draws, (d, size, nnz) = 400, (6, 4, 2)
    counts = np.zeros((d, size))
    rng = np.random.default_rng(0)
    for _ in range(draws):
        for row, columns in enumerate(_balanced_positions(rng, d, size, nnz)):
            counts[row, columns] += 1
    share = nnz / size
    assert np.abs(counts / draws - share).max() < 5 * np.sqrt(share * (1 - share) / draws)


def test_values_follow_their_law():
    for law in ("sign", "normal"):
        p = make_projector(0, 512, 64, 4, law=law)
        values = np.asarray(p.values)
        assert values.dtype == np.float32
        assert abs(values.mean()) < 5 * 0.5 / np.sqrt(values.size)
        np.testing.assert_allclose(values.var() * 4, 1, rtol=5 * np.sqrt(2 / values.size))
        if law == "sign":
            assert set(np.unique(values)) == {np.float32(-0.5), np.float32(0.5)}
    same, other = make_projector(0, 512, 64, 4, law="normal"), make_projector(1, 512, 64, 4)
    np.testing.assert_array_equal(same.indices, p.indices)
    assert np.any(np.asarray(other.indices) != np.asarray(p.indices))
    rng = np.random.default_rng(0)  # a generator moves on, a seed does not
    first, second = make_projector(rng, 64, 16, 2), make_projector(rng, 64, 16, 2)
    assert np.any(np.asarray(first.indices) != np.asarray(second.indices))


def test_arrays_are_as_narrow_as_they_can_be():
    kinds = {
        (256, 256, 1): ("uint8", "uint16"),
        (300, 257, 2): ("uint16", "uint16"),
        (128, 64, 1): ("uint8", "uint8"),
        (70_000, 70_000, 1): ("uint32", "uint32"),
    }
    for (d, size, nnz), want in kinds.items():
        p = make_projector(0, d, size, nnz, dtype=jnp.bfloat16)
        assert (str(p.indices.dtype), str(p.slots.dtype)) == want
        assert p.values.dtype == jnp.bfloat16
    p = make_projector(0, 300, 100, 2, dtype=jnp.bfloat16)
    # One byte for a column below 256, two for a value, two for a slot below 65536.
    assert p.nbytes == 600 * 1 + 600 * 2 + 600 * 2
    assert cache(p).nbytes == p.nbytes + 300 * 100 * 2


@pytest.mark.parametrize(
    ("d", "size", "nnz", "cached"),
    [(1, 1, 1, False), (33, 32, 20, False), (13, 5, 3, False), (48, 24, 4, True)],
)
def test_products_equal_dense_ones(d, size, nnz, cached):
    p = make_projector(d, d, size, nnz, law="normal")
    q = make_projector(7, 20, 9, 5, law="normal")
    old = make_projector(8, d, max(1, size // 2), 1)
    dense_p, dense_q, dense_old = dense64(p), dense64(q), dense64(old)
    np.testing.assert_array_equal(to_dense(p), dense_p.astype(np.float32))
    if cached:
        p, q = cache(p), cache(q)
    x, z = normal(0, 2, 3, d), normal(1, 2, 3, size)
    g, delta = normal(2, d, 20), normal(3, size, 9)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}

    @jax.jit
    def products(p, q, old, x, z, g, delta):
        return {
            "project": project(x, p),
            "lift": lift(z, p),
            "project_matrix": project_matrix(g, p, q),
            "lift_matrix": lift_matrix(delta, p, q),
            "lift_rows": lift_rows(z[0].T, p, d // 2, jnp.ones((d - d // 2, 3))),
            "left": project_matrix(g, p, None),
            "right": lift_matrix(delta, None, q),
            "gram": gram(p),
            "cross": cross(p, old),
            "cross_to": cross(old, p),
        }

    got = products(p, q, old, *(jnp.asarray(a, jnp.float32) for a in (x, z, g, delta)))
    want = {
        "project": x @ dense_p,
        "lift": z @ dense_p.T,
        "project_matrix": dense_p.T @ g @ dense_q,
        "lift_matrix": dense_p @ delta @ dense_q.T,
        "lift_rows": 1 + (dense_p @ z[0].T)[d // 2 :],
        "left": dense_p.T @ g,
        "right": delta @ dense_q.T,
        "gram": dense_p.T @ dense_p,
        "cross": dense_p.T @ dense_old,
        "cross_to": dense_old.T @ dense_p,
    }
    for name, value in want.items():
        assert got[name].dtype == jnp.float32
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(got[name] / scale, value / scale, **tolerance, err_msg=name)


def test_products_are_adjoint():
    p = make_projector(3, 30, 12, 4, law="normal")
    x, z = normal(4, 30), normal(5, 12)
    there, back = jax.jit(lambda p: (project(jnp.asarray(x), p), lift(jnp.asarray(z), p)))(p)
    there, back = np.asarray(there, np.float64), np.asarray(back, np.float64)
    np.testing.assert_allclose(there @ z, x @ back, rtol=1e-5)


def test_narrow_arrays_are_summed_in_fp32():
    p = make_projector(0, 48, 12, 3, dtype=jnp.bfloat16, law="normal")
    x = jnp.asarray(normal(0, 5, 48), jnp.bfloat16)
    want = np.asarray(x, np.float64) @ dense64(p)  # of the bf16 numbers themselves
    for kind in (p, cache(p)):
        np.testing.assert_allclose(jax.jit(project)(x, kind), want, rtol=1e-5, atol=1e-5)


def test_none_stands_for_the_identity():
    x = jnp.asarray(normal(0, 3, 4), jnp.float32)
    for product in (project, lift):
        np.testing.assert_array_equal(product(x, None), x)
    for product in (project_matrix, lift_matrix):
        np.testing.assert_array_equal(product(x, None, None), x)
    assert gram(None) is None and cross(None, None) is None
    p = make_projector(0, 5, 3, 2)
    np.testing.assert_array_equal(cross(p, None), dense64(p).T.astype(np.float32))
    np.testing.assert_array_equal(cross(None, p), dense64(p).astype(np.float32))


def test_identity_and_permutation_are_exact():
    x = jnp.asarray(normal(0, 3, 7), jnp.float32)
    identity = identity_projector(7)
    np.testing.assert_array_equal(to_dense(identity), np.eye(7))
    np.testing.assert_array_equal(project(x, identity), x)
    permutation = np.random.default_rng(0).permutation(7)
    p = identity_projector(7, permutation)
    np.testing.assert_array_equal(np.asarray(project(x, p))[:, permutation], x)
    np.testing.assert_array_equal(lift(project(x, p), p), x)


def test_dense_projectors_take_any_matrix():
    matrix, _ = np.linalg.qr(normal(0, 9, 4))
    p = dense_projector(jnp.asarray(matrix, jnp.float32))
    x = normal(1, 2, 9)
    for kind in (p, uncache(p)):
        got = jax.jit(lambda kind: (project(jnp.asarray(x), kind), gram(kind)))(kind)
        np.testing.assert_allclose(got[0], x @ matrix, atol=1e-6)
        np.testing.assert_allclose(got[1], np.eye(4), atol=1e-6)


def test_stacks_multiply_layer_by_layer():
    ps = [make_projector(i, 10, 6, 2) for i in range(3)]
    qs = [make_projector(9 + i, 8, 4, 3) for i in range(3)]
    p, q = stack_projectors(ps), stack_projectors(qs)
    assert p.stack_shape == (3,) and (p.d, p.size, p.nnz) == (10, 6, 2)
    np.testing.assert_array_equal(to_dense(p), [to_dense(one) for one in ps])
    x, g = (jnp.asarray(a, jnp.float32) for a in (normal(0, 3, 2, 10), normal(1, 3, 10, 8)))
    dense_p, dense_q = np.stack([dense64(p) for p in ps]), np.stack([dense64(q) for q in qs])
    want = np.einsum("lis,lio,lot->lst", dense_p, g, dense_q)
    both = jax.jit(project_matrix)
    np.testing.assert_allclose(both(g, p, q), want, atol=1e-5)
    np.testing.assert_allclose(both(g, cache(p), q), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(project)(x, p), x @ dense_p, atol=1e-5)
    np.testing.assert_allclose(jax.jit(gram)(p), dense_p.swapaxes(1, 2) @ dense_p, atol=1e-5)
    shared = jax.jit(jax.vmap(project_matrix, in_axes=(0, 0, None)))(g, p, qs[0])
    want = np.einsum("lis,lio,ot->lst", dense_p, g, dense_q[0])
    np.testing.assert_allclose(shared, want, atol=1e-5)
    twice = stack_projectors([p, p])
    assert twice.stack_shape == (2, 3)
    lifted = jax.jit(lift)(jnp.ones((2, 3, 6)), twice)
    np.testing.assert_allclose(lifted, [dense_p.sum(-1)] * 2, atol=1e-5)


def test_values_are_replaced_in_place_of_the_old():
    p = make_projector(0, 10, 5, 2)
    values = jnp.asarray(normal(0, 10, 2), jnp.float32)
    new, cached = with_values(p, values), with_values(cache(p), values)
    np.testing.assert_array_equal(to_dense(new), dense64(new))
    np.testing.assert_array_equal(cached.cached, to_dense(new))
    np.testing.assert_array_equal(new.indices, p.indices)
    assert new.cached is None and uncache(cached).cached is None
    assert len(jax.tree.leaves(new)) == 3  # a pytree: jit, vmap and checkpoints see its arrays
    assert isinstance(jax.jit(lambda p: p)(p), SparseProjector)


def test_lifting_is_differentiable_in_what_is_lifted():
    p, q = make_projector(0, 10, 6, 4, law="normal"), make_projector(1, 8, 4, 3, law="normal")
    weights, delta = normal(0, 10, 8), jnp.zeros((6, 4))
    gradient = jax.jit(jax.grad(lambda d: jnp.sum(lift_matrix(d, p, q) * weights)))(delta)
    np.testing.assert_allclose(gradient, dense64(p).T @ weights @ dense64(q), atol=1e-5)


def test_temporaries_do_not_grow_with_the_non_zeros():
    x = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    bytes_of = {}
    for nnz in (4, 32):
        p = make_projector(0, 256, 64, nnz)
        for name, product, arg in (
            ("project", project, x),
            ("lift", lift, jax.ShapeDtypeStruct((512, 64), jnp.float32)),
        ):
            compiled = jax.jit(product).lower(arg, p).compile()
            bytes_of[name, nnz] = compiled.memory_analysis().temp_size_in_bytes
    assert bytes_of["project", 32] < 3 * x.size * 4  # (n, d, nnz) would be 16 MiB
    assert bytes_of["lift", 32] < 3 * x.size * 4


def test_the_faster_product_is_measured(monkeypatch):
    p = make_projector(0, 12, 6, 2)
    for slow in (0, 1):  # sparse is timed first: one of the two kinds gets a slow clock
        ticks = iter([0.0, 1.0 + slow, 10.0, 12.0 - slow])
        clock = SimpleNamespace(perf_counter=lambda t=ticks: next(t))
        monkeypatch.setattr(_projector_choice, "time", clock)
        chosen = faster_products(p, tokens=3, repeats=1)
        assert (chosen.cached is None) == (slow == 0)
        np.testing.assert_array_equal(to_dense(chosen), to_dense(p))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: make_projector(0, 8, 4, 5), "size=4 and nnz=5"),
        (lambda: make_projector(0, 8, 9, 2), "8 rows.*size=9"),
        (lambda: make_projector(0, 8, 4, 0), "nnz=0"),
        (lambda: make_projector(0, 8, 4, 2, law="uniform"), "'uniform'"),  # pyright: ignore
        (lambda: identity_projector(3, [0, 1, 1]), "no permutation"),
        (lambda: dense_projector(jnp.zeros((2, 3))), r"\(2, 3\)"),
        (lambda: with_values(make_projector(0, 8, 4, 2), jnp.zeros((8, 3))), r"\(8, 3\)"),
        (lambda: stack_projectors([]), "equal"),
        (
            lambda: stack_projectors([make_projector(0, 8, 4, 2), make_projector(0, 8, 4, 1)]),
            r"\(8, 4, 2\), \(8, 4, 1\)",
        ),
    ],
)
def test_impossible_projectors_are_refused(build, match):
    with pytest.raises(ProjectorError, match=match):
        build()
