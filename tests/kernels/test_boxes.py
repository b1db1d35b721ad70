"""Boxes in places where models put them: sharding metadata, dropout, custom layers, checkpoints."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from jax.sharding import Mesh

from emloc_jax.errors import MaskShapeError, UnsupportedKernelError
from emloc_jax.kernels import (
    Layout,
    LoraKernel,
    LowRankKernel,
    TappedKernel,
    find_kernels,
    intercept,
    materialize,
    register_handler,
    set_leaves,
    use_dense,
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class OwnLayer(nn.Module):
    """A layer the library has never heard of."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1], 6))
        return jnp.einsum("bi,io->bo", x, w)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(4, name="first")(x))
        return nn.Dense(2, name="last")(OwnLayer(name="own")(x))


def model_and_params():
    model, x = Model(), normal(0, 3, 5)
    return model, model.init(jax.random.key(1), x)["params"], x


def test_a_custom_layer_computes_right_answers_and_is_reported():
    model, params, x = model_and_params()
    kernels = find_kernels(model.apply, params, x)
    assert {path: spec.handler for path, spec in kernels.items()} == {
        "first/kernel": "Dense",
        "own/w": None,
        "last/kernel": "Dense",
    }
    assert "no handler" in kernels["own/w"].reason and kernels["own/w"].module_type == "OwnLayer"
    boxed = set_leaves(params, {"own/w": LowRankKernel(normal(2, 4, 2), normal(3, 2, 6))})
    want = model.apply({"params": materialize(boxed)}, x)
    chex.assert_trees_all_close(model.apply({"params": boxed}, x), want, atol=1e-5)
    with pytest.raises(UnsupportedKernelError, match="'own/w' of OwnLayer.*register_handler"):
        intercept(model.apply)({"params": boxed}, x)
    allowed = intercept(model.apply, allow_materialize=True)({"params": boxed}, x)
    chex.assert_trees_all_close(allowed, want, atol=1e-5)


def test_subclasses_need_an_entry_of_their_own():
    class Doubling(nn.Dense):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model, x = Doubling(3), normal(0, 2, 4)
    params = model.init(jax.random.key(0), x)["params"]
    assert find_kernels(model.apply, params, x)["kernel"].handler is None
    boxed = {**params, "kernel": LowRankKernel(normal(1, 4, 2), normal(2, 2, 3))}
    want = model.apply({"params": materialize(boxed)}, x)
    chex.assert_trees_all_close(model.apply({"params": boxed}, x), want, atol=1e-5)

    class Same(nn.Dense):
        pass

    register_handler(Same, use_dense)
    assert find_kernels(Same(3).apply, params, x)["kernel"].handler == "Same"


@pytest.mark.parametrize(
    ("module", "shape", "match"),
    [
        (nn.DenseGeneral(3, batch_dims=(0,)), (2, 4), "batch_dims"),
        (nn.Conv(4, (3,), feature_group_count=2), (1, 5, 4), "feature_group_count"),
        (nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4))), (1, 5, 4), "masks"),
        (nn.Dense(3, dot_general=jax.lax.dot_general), (2, 4), "dot_general"),
        (nn.Einsum((2, 4, 3), "BED,EDF->BEF"), (5, 2, 4), "not purely"),
        (nn.Einsum((4, 3), "BTD,DF->BF"), (5, 2, 4), "sums over"),
    ],
)
def test_unsupported_uses_are_reported_and_still_right(module, shape, match):
    x = normal(0, *shape)
    params = module.init(jax.random.key(0), x)["params"]
    spec = find_kernels(module.apply, params, x)["kernel"]
    assert spec.handler is None
    assert match in spec.reason
    layout = Layout(num_in=params["kernel"].ndim - 1)
    left = normal(1, *params["kernel"].shape[:-1], 2)
    box = LowRankKernel(left, normal(2, 2, params["kernel"].shape[-1]), layout)
    boxed = {**params, "kernel": box}
    want = module.apply({"params": {**params, "kernel": box.unbox()}}, x)
    chex.assert_trees_all_close(module.apply({"params": boxed}, x), want)
    with pytest.raises(UnsupportedKernelError, match=match):
        intercept(module.apply)({"params": boxed}, x)


def test_inputs_shared_by_projections_are_grouped():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k = nn.Dense(4, name="q")(x), nn.Dense(2, name="k")(x)
            again = nn.Dense(4, name="twice")
            return again(again(x)) + nn.Dense(4, name="o")(q * k.sum(-1, keepdims=True))

    model, x = Attention(), normal(0, 3, 4)
    kernels = find_kernels(model.apply, model.init(jax.random.key(0), x)["params"], x)
    groups = {path: spec.input_group for path, spec in kernels.items()}
    # A module called on two inputs has another moment than one that saw only the first.
    assert groups == {p: "k/kernel" if p in ("k/kernel", "q/kernel") else p for p in groups}


def test_partitioned_kernels_and_factors():
    model = nn.Dense(
        4, kernel_init=nn.with_partitioning(nn.initializers.normal(1.0), ("in", "out"))
    )
    x = normal(0, 3, 6)
    params = model.init(jax.random.key(0), x)["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    assert find_kernels(model.apply, params, x)["kernel"].shape == (6, 4)
    box = LoraKernel(
        LowRankKernel(
            nn.Partitioned(normal(1, 6, 2), ("in", None)),
            nn.Partitioned(normal(2, 2, 4), (None, "out")),
        ),
        normal(3, 6, 2),
        normal(4, 2, 4),
    )
    for kernel in (
        box,
        nn.Partitioned(box, ()),
        LoraKernel(params["kernel"], box.lora_a, box.lora_b),
    ):
        boxed = {**params, "kernel": kernel}
        want = model.apply({"params": boxed}, x)
        fast = intercept(model.apply)({"params": boxed}, x)
        chex.assert_trees_all_close(fast, want, atol=1e-4)
    specs = nn.get_partition_spec({"kernel": box})["kernel"]
    assert specs.base.left == jax.sharding.PartitionSpec("in", None)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("in", "out"))
    placed = jax.device_put(
        jax.tree.map(lambda a: a, nn.meta.unbox({"l": box.base.left}))["l"],
        nn.get_sharding({"kernel": box}, mesh)["kernel"].base.left,
    )
    assert len(placed.sharding.device_set) == 2


def test_partitioned_factors_under_scan():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            init = nn.with_partitioning(nn.initializers.normal(0.5), ("in", "out"))
            return nn.Dense(4, kernel_init=init, name="d")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(name="layers")(x, None)[0]

    x = normal(0, 2, 4)
    params = Stack().init(jax.random.key(0), x)["params"]
    box = LowRankKernel(
        nn.Partitioned(normal(1, 3, 4, 2), ("layers", "in", None)),
        nn.Partitioned(normal(2, 3, 2, 4), ("layers", None, "out")),
    )
    boxed = set_leaves(params, {"layers/d/kernel": box})
    fast = intercept(Stack().apply)({"params": boxed}, x)
    chex.assert_trees_all_close(fast, Stack().apply({"params": boxed}, x), atol=1e-4)


def test_dropout_rides_in_the_box():
    model, x = nn.Dense(3, use_bias=False), jnp.ones((400, 8))
    base, a, b = jnp.zeros((8, 3)), normal(1, 8, 2), normal(2, 2, 3)
    apply = intercept(model.apply)

    def run(key, rate=0.25):
        kernel = LoraKernel(base, a, b, key, alpha=4.0, dropout=rate)
        return apply({"params": {"kernel": kernel}}, x)

    clean = apply({"params": {"kernel": LoraKernel(base, a, b, alpha=4.0)}}, x)
    y = run(jax.random.key(0))
    chex.assert_trees_all_equal(y, run(jax.random.key(0)))
    assert jnp.any(y != run(jax.random.key(1)))
    chex.assert_trees_all_equal(run(jax.random.key(0), 0.0), clean)
    # Inverted dropout is unbiased: the mean over rows is within 5 standard errors.
    error = jnp.abs(y.mean(0) - clean[0]) / (y.std(0) / jnp.sqrt(len(y)))
    assert jnp.all(error < 5)
    with pytest.raises(UnsupportedKernelError, match="dropout 0.25.*intercept"):
        model.apply(
            {"params": {"kernel": LoraKernel(base, a, b, jax.random.key(0), dropout=0.25)}}, x
        )


def test_an_ill_fitting_mask_is_refused():
    model, x = nn.Dense(3), normal(0, 2, 5, 4)
    params = model.init(jax.random.key(0), x)["params"]
    mask = jnp.ones((3, 5), bool)
    tap = TappedKernel(params["kernel"], moment=jnp.zeros((4, 4)), mask=mask)
    with pytest.raises(MaskShapeError, match=r"\(3, 5\).*\(2, 5\)"):
        intercept(model.apply)({"params": {**params, "kernel": tap}}, x)


def test_boxes_survive_serialization_and_optimizers():
    box = LoraKernel(
        LowRankKernel(normal(0, 3, 2), normal(1, 2, 4)), normal(2, 3, 1), normal(3, 1, 4), alpha=7.0
    )
    state = serialization.to_bytes(box)
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, box), state)
    assert restored.alpha == 7.0
    chex.assert_trees_all_equal(restored, box)
    tx = optax.adam(1e-2)
    updates, _ = tx.update(box, tx.init(box), box)
    assert isinstance(optax.apply_updates(box, updates), LoraKernel)
    with pytest.raises(TypeError, match="materialize"):
        box.replace_boxed(jnp.zeros((3, 4)))


def test_low_rank_lookup_needs_little_memory():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(4096, 64, name="embed")
            return embed.attend(embed(ids))

    box = LowRankKernel(normal(0, 64, 8), normal(1, 8, 4096), Layout(perm=(1, 0)))
    ids = jnp.arange(2)
    temp = {}
    for name, apply in {"fast": intercept(Tied().apply), "slow": Tied().apply}.items():
        step = jax.jit(
            lambda box, apply=apply: apply({"params": {"embed": {"embedding": box}}}, ids)
        )
        temp[name] = step.lower(box).compile().memory_analysis().temp_size_in_bytes
        temp[name + "_y"] = step(box)
    chex.assert_trees_all_close(temp["fast_y"], temp["slow_y"], rtol=1e-3, atol=1e-3)
    assert temp["fast"] < 0.1 * temp["slow"]
