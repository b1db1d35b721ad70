"""Bad input to the correction: refused before anything is computed."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from emloc_jax.adapters import attach, correct
from emloc_jax.errors import AdapterMismatchError, NonFiniteError, RatioError
from emloc_jax.kernels import TappedKernel
from tests.adapters.cases import make_case, product, relative


def test_correcting_twice():
    case = make_case()
    once = correct(case.adapters, case.params, case.emulator)
    with pytest.raises(AdapterMismatchError, match=r"already.*'block/kernel'.*twice"):
        correct(once, case.params, case.emulator)
    with pytest.raises(AdapterMismatchError, match="already"):
        correct(once, case.params, case.emulator, limit=0)


@pytest.mark.parametrize("limit", [-1.0, math.nan, -math.inf])
def test_an_impossible_limit(limit):
    case = make_case()
    with pytest.raises(RatioError, match="limit"):
        correct(case.adapters, case.params, case.emulator, limit=limit)


def test_an_unknown_bound():
    case = make_case()
    with pytest.raises(RatioError, match="row, kernel, column; got 'rows'"):
        correct(case.adapters, case.params, case.emulator, bound="rows")  # pyright: ignore


def test_the_trees_exchanged():
    case = make_case()
    with pytest.raises(AdapterMismatchError, match=r"original kernel.*LowRankKernel"):
        correct(case.adapters, case.emulator, case.params)


def test_an_emulator_with_adapters_or_taps_on():
    case = make_case()
    with pytest.raises(AdapterMismatchError, match=r"factors.*LoraKernel"):
        correct(case.adapters, case.params, attach(case.emulator, case.adapters))
    tapped = {"block": {"kernel": TappedKernel(case.params["block"]["kernel"])}}
    with pytest.raises(AdapterMismatchError, match="TappedKernel"):
        correct(case.adapters, case.params, tapped)


@pytest.mark.parametrize("side", ["params", "emulator"])
def test_a_kernel_missing_or_of_another_shape_on_one_side(side):
    case = make_case()
    name = "original parameters" if side == "params" else "emulator"
    trees = {"params": case.params, "emulator": case.emulator}
    trees[side] = {"other": trees[side]["block"]}
    with pytest.raises(AdapterMismatchError, match=rf"{name}.*other/kernel"):
        correct(case.adapters, **trees)
    trees[side] = getattr(make_case("wide"), side)
    with pytest.raises(AdapterMismatchError, match=rf"{name}.*kernel \(8, 20\)"):
        correct(case.adapters, **trees)


@pytest.mark.parametrize("where", ["adapter", "params", "emulator"])
def test_numbers_that_are_not_finite(where):
    case = make_case()

    def spoil(tree):
        return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), tree)

    trees = {"adapters": case.adapters, "params": case.params, "emulator": case.emulator}
    key = "adapters" if where == "adapter" else where
    trees[key] = spoil(trees[key])
    with pytest.raises(NonFiniteError, match="block/kernel"):
        correct(**trees)


def test_sharding_metadata_is_looked_through():
    case = make_case()
    names = (None, None)
    params = {"block": {"kernel": nn.Partitioned(case.params["block"]["kernel"], names)}}
    box = case.emulator["block"]["kernel"]
    box = box.replace(left=nn.Partitioned(box.left, names), right=nn.Partitioned(box.right, names))
    got = correct(case.adapters, params, {"block": {"kernel": box}})["block/kernel"]
    expected = correct(case.adapters, case.params, case.emulator)["block/kernel"]
    assert relative(product(got), product(expected)) == 0
