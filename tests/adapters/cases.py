"""Random kernels, emulators and adapters in every layout, and their float64 matrices."""

import dataclasses
import math

import jax
import numpy as np
from jax import numpy as jnp

from emloc_jax.adapters import Adapter
from emloc_jax.kernels import KernelSpec, Layout, LowRankKernel

# name: (layout, stack, in axes, out axes)
LAYOUTS = {
    "dense": (Layout(), (), (12,), (10,)),
    "wide": (Layout(), (), (8,), (20,)),
    "scanned": (Layout(), (3,), (12,), (10,)),
    "scanned twice": (Layout(), (2, 2), (8,), (6,)),
    "two inputs": (Layout(num_in=2), (), (3, 4), (10,)),
    "two outputs, scanned": (Layout(num_out=2), (2,), (12,), (2, 5)),
    "transposed": (Layout(perm=(1, 0)), (), (12,), (10,)),
    "mixed axes, scanned": (Layout(num_in=2, perm=(0, 2, 1)), (2,), (3, 4), (10,)),
}


@dataclasses.dataclass
class Case:
    """One kernel path 'block/kernel' in three trees, and the matrices that they stand for."""

    params: dict
    emulator: dict
    adapters: dict
    kernel: np.ndarray  # float64 (*stack, d_in, d_out), as are the next three
    emulated: np.ndarray
    lora_a: np.ndarray
    lora_b: np.ndarray

    @property
    def adapter(self) -> Adapter:
        return self.adapters["block/kernel"]


@dataclasses.dataclass
class Moment:
    """All that a correction needs of a second moment."""

    sum: jax.Array


def make_case(name="dense", *, rank=4, ratio=1.0, rslora=False, whole=False, seed=0, b_scale=1.0):
    """A case with `alpha = ratio * rank`; `whole` keeps the emulator's kernel an array."""
    layout, stack, in_shape, out_shape = LAYOUTS[name]
    rng = np.random.default_rng(seed)
    d_in, d_out, inner = math.prod(in_shape), math.prod(out_shape), 3

    def normal(*shape):
        return rng.standard_normal((*stack, *shape)).astype(np.float32)

    kernel, left, right = normal(d_in, d_out), normal(d_in, inner), normal(inner, d_out)
    lora_a, lora_b = normal(d_in, rank), b_scale * normal(rank, d_out)
    emulated = left.astype(float) @ right.astype(float)

    def array(matrix):
        return jnp.asarray(layout.from_matrix(matrix, in_shape, out_shape), jnp.float32)

    if whole:
        box = array(emulated)
    else:
        left = left.reshape(*stack, *in_shape, inner)
        right = right.reshape(*stack, inner, *out_shape)
        box = LowRankKernel(jnp.asarray(left), jnp.asarray(right), layout)
    adapter = Adapter(
        jnp.asarray(lora_a.reshape(*stack, *in_shape, rank)),
        jnp.asarray(lora_b.reshape(*stack, rank, *out_shape)),
        alpha=ratio * rank,
        rslora=rslora,
        layout=layout,
    )
    return Case(
        params={"block": {"kernel": array(kernel), "bias": jnp.ones(out_shape)}},
        emulator={"block": {"kernel": box, "bias": jnp.ones(out_shape)}},
        adapters={"block/kernel": adapter},
        kernel=kernel.astype(float),
        emulated=emulated,
        lora_a=lora_a.astype(float),
        lora_b=lora_b.astype(float),
    )


def product(adapter: Adapter) -> np.ndarray:
    """`scale * lora_a @ lora_b` as float64 (*stack, d_in, d_out)."""
    a, b = (np.asarray(x, np.float64) for x in adapter.matrices())
    return adapter.scale * a @ b


def make_spec(path="block/kernel", **changes) -> KernelSpec:
    spec = KernelSpec(
        path=path,
        module_type="Dense",
        handler="Dense",
        reason="",
        layout=Layout(),
        stack_shape=(),
        in_shape=(12,),
        out_shape=(10,),
        dtype=jnp.float32,
        input_group=path,
    )
    return dataclasses.replace(spec, **changes)


def relative(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
