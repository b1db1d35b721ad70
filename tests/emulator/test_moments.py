"""Merging, saving and loading second moments and factorizations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.emulator import (
    SecondMoment,
    factorize,
    load_factorizations,
    load_moments,
    merge_moments,
    save_factorizations,
    save_moments,
)
from emloc_jax.errors import CheckpointError, MomentShapeError, OutputExistsError


def make_moments(size=4):
    shared = jnp.arange(size * size, dtype=jnp.float32).reshape(size, size)
    count = jnp.float32(3)
    return {
        "layers/0/q/kernel": SecondMoment(shared, count, jnp.eye(2)),
        "layers/0/k/kernel": SecondMoment(shared, count),
        "layers/0/o/kernel": SecondMoment(jnp.ones((2, 3, 3)), jnp.ones(2)),
    }


def test_moments_come_back_from_disk_with_what_they_shared(tmp_path):
    moments, path = make_moments(), tmp_path / "moments.safetensors"
    save_moments(path, moments)
    loaded = load_moments(path)
    assert list(loaded) == list(moments)
    assert jax.tree.structure(loaded) == jax.tree.structure(moments)
    for one, two in zip(jax.tree.leaves(moments), jax.tree.leaves(loaded), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        np.testing.assert_array_equal(one, two)
    assert loaded["layers/0/q/kernel"].sum is loaded["layers/0/k/kernel"].sum
    floats = 16 + 1 + 4 + 18 + 2  # the shared sum once
    assert path.stat().st_size - 4 * floats < 1500


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "moments.safetensors"
    save_moments(path, make_moments())
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        save_moments(path, make_moments())
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "other kind"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "moments.safetensors"
    save_moments(path, make_moments())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "garbage":
        path.write_bytes(b"no tensors here")
    else:
        path.unlink()
        save_factorizations(path, {"kernel": factorize(jnp.eye(6))})
    with pytest.raises(CheckpointError, match="moments.safetensors"):
        load_moments(path)


def test_factorizations_come_back_from_disk(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "spectra.safetensors"
    rows = rng.normal(size=(40, 8)).astype(np.float32)
    kernel = rng.normal(size=(8, 6)).astype(np.float32)
    full = {"b": factorize(kernel, rows.T @ rows), "a": factorize(kernel)}
    save_factorizations(path, full)
    loaded = load_factorizations(path)
    assert list(loaded) == ["b", "a"]
    assert loaded["b"].weighting == "one_sided" and loaded["a"].weighting == "plain"
    for one, two in zip(jax.tree.leaves(full), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(one, two)


def test_moments_of_different_calibrations_do_not_merge():
    moments = make_moments()
    with pytest.raises(MomentShapeError, match="only one side"):
        merge_moments(moments, {"layers/0/q/kernel": moments["layers/0/q/kernel"]})
    with pytest.raises(MomentShapeError, match="layers/0/q/kernel"):
        merge_moments(moments, make_moments(size=5))
