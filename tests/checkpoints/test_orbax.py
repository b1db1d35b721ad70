"""Orbax checkpoints of parameters, with and without a target."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emloc_jax.checkpoints import load_orbax, save_orbax
from emloc_jax.errors import CheckpointError, OutputExistsError
from emloc_jax.kernels import LowRankKernel


@pytest.fixture
def params():
    return {
        "layers": {"0": {"kernel": jnp.arange(12.0).reshape(3, 4).astype(jnp.bfloat16)}},
        "norm": {"scale": jnp.arange(5.0)},
    }


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [x.dtype for x in jax.tree.leaves(one)] == [x.dtype for x in jax.tree.leaves(other)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_round_trip(tmp_path, params):
    save_orbax(tmp_path / "out", params, hf_config={"model_type": "llama"})
    same(load_orbax(tmp_path / "out"), params)
    same(load_orbax(tmp_path / "out", jax.eval_shape(lambda: params)), params)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    with ocp.StandardCheckpointer() as plain:
        same(plain.restore(tmp_path / "out" / "params", params), params)


def test_restores_onto_a_sharding(tmp_path, params):
    save_orbax(tmp_path / "out", params)
    mesh = jax.make_mesh((1,), ("x",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), params)
    restored = load_orbax(tmp_path / "out", like)
    same(restored, params)
    assert all(x.sharding == spread for x in jax.tree.leaves(restored))


def test_refusals(tmp_path, params):
    save_orbax(tmp_path / "out", params)
    with pytest.raises(OutputExistsError):
        save_orbax(tmp_path / "out", params)
    boxed = {"a": {"kernel": LowRankKernel(jnp.ones((2, 1)), jnp.ones((1, 2)))}}
    with pytest.raises(CheckpointError, match="a/kernel.*materialize"):
        save_orbax(tmp_path / "new", boxed)
    with pytest.raises(CheckpointError, match="no Orbax checkpoint"):
        load_orbax(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read as asked"):
        load_orbax(tmp_path / "out", {"other": {"kernel": jnp.ones((2, 2))}})
    # Only the metadata: damaged arrays leave Orbax's threads failing after the test.
    (tmp_path / "out" / "params" / "_METADATA").write_bytes(b"{")
    with pytest.raises(CheckpointError):
        load_orbax(tmp_path / "out", params)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
