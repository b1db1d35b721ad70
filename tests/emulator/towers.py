"""A small gated tower, unrolled or scanned, and the same tower by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from emloc_jax.kernels import find_kernels

B, T, D, H, LAYERS = 2, 5, 6, 8, 2


class Layer(nn.Module):
    partitioned: bool = False

    @nn.compact
    def __call__(self, h, _=None):
        init = nn.initializers.lecun_normal()
        if self.partitioned:
            init = nn.with_partitioning(init, ("embed", "hidden"))
        q = nn.Dense(H, name="q", kernel_init=init)(h)
        k = nn.Dense(H, name="k")(h)
        return h + nn.Dense(D, name="o", use_bias=False)(q * jnp.tanh(k)), None


class Tower(nn.Module):
    scanned: bool = False
    partitioned: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            stack = nn.scan(
                nn.remat(Layer, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=LAYERS,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(self.partitioned, name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = Layer(self.partitioned, name=f"layers_{i}")(x)
        return nn.Dense(1, name="head")(x)


def make_tower(scanned=False, **kwargs):
    """`(model, params, kernels, rows)` with biases that are not zero."""
    model = Tower(scanned, **kwargs)
    rows = jax.random.normal(jax.random.key(1), (B, T, D))
    params = model.init(jax.random.key(0), rows)["params"]
    params = jax.tree.map(lambda a: a + 0.01 * jnp.arange(a.size).reshape(a.shape) / a.size, params)
    return model, params, find_kernels(model.apply, params, rows), rows


def layer_params(params, scanned):
    if scanned:
        return [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(LAYERS)]
    return [params[f"layers_{i}"] for i in range(LAYERS)]


def by_hand(params, scanned, x, offsets=None):
    """Loss summed over tokens, and the input rows of every kernel; `offsets` shift outputs."""
    rows = {}
    for i, layer in enumerate(layer_params(params, scanned)):
        offset = {} if offsets is None else offsets[i]
        q = x @ layer["q"]["kernel"] + layer["q"]["bias"] + offset.get("q", 0)
        k = x @ layer["k"]["kernel"] + layer["k"]["bias"] + offset.get("k", 0)
        gated = q * jnp.tanh(k)
        rows[i] = {"q": x, "k": x, "o": gated}
        x = x + gated @ layer["o"]["kernel"] + offset.get("o", 0)
    out = x @ params["head"]["kernel"] + params["head"]["bias"]
    return jnp.sum(out**2), rows


def moments_by_hand(params, scanned, x, mask):
    """`{(layer, name): (sum x x^T, sum g g^T)}` in float64, over the tokens of `mask`."""
    sizes = {"q": H, "k": H, "o": D}
    offsets = [{n: jnp.zeros((B, T, s)) for n, s in sizes.items()} for _ in range(LAYERS)]
    _, rows = by_hand(params, scanned, x)
    gradients = jax.grad(lambda o: by_hand(params, scanned, x, o)[0])(offsets)
    mask = np.ones((B, T), bool) if mask is None else mask
    result = {}
    for i in range(LAYERS):
        for name in sizes:
            kept = np.float64(rows[i][name])[mask], np.float64(gradients[i][name])[mask]
            result[i, name] = tuple(a.T @ a for a in kept)
    return result
