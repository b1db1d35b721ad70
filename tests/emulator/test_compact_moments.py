"""Compact moments from calibration: numbers, forms, sizes, files, merging, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.adapters import correct, init_adapters
from emloc_jax.checkpoints import calibration_fingerprint
from emloc_jax.emulator import (
    CompactMoment,
    SecondMoment,
    Taps,
    _moment_forms,
    calibrate,
    calibration_step,
    compact_sides,
    compress,
    load_moments,
    merge_moments,
    moment_arrays,
    save_moments,
)
from emloc_jax.errors import ConfigError, MomentShapeError, NoTokensError
from emloc_jax.kernels import find_kernels

from .towers import LAYERS, B, D, H, T, layer_params, make_tower, moments_by_hand

MASK = np.arange(B * T).reshape(B, T) % 3 != 0


def run(scanned=False, *, moments, mask=None, shift=0.0, gradients=True):
    model, params, kernels, x = make_tower(scanned)
    found = calibrate(
        lambda variables, x: jnp.sum(model.apply(variables, x) ** 2),
        params,
        [x + shift],
        kernels=kernels,
        mask=None if mask is None else lambda batch: mask,
        gradients=gradients,
        moments=moments,
    )
    return params, kernels, found


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_moments_equal_those_by_hand(scanned, mask):
    """`q` and `k` (6 x 8) are wide and share a full sum; `o` (8 x 6) is tall."""
    model, params, _, x = make_tower(scanned)
    _, _, moments = run(scanned, moments="compact", mask=mask)
    for (layer, name), pair in moments_by_hand(params, scanned, x, mask).items():
        moment = moments[f"layers/{name}/kernel" if scanned else f"layers_{layer}/{name}/kernel"]
        if scanned:
            moment = jax.tree.map(lambda a, i=layer: a[i], moment)
        kernel = np.float64(layer_params(params, scanned)[layer][name]["kernel"])
        assert isinstance(moment.sum, CompactMoment) == (name == "o")
        assert isinstance(moment.gradient, CompactMoment) == (name != "o")
        full, compact = (moment.gradient, moment.sum) if name == "o" else (
            moment.sum, moment.gradient
        )  # fmt: skip
        own, other = pair[::-1] if name == "o" else pair
        kernel = kernel if name == "o" else kernel.T
        np.testing.assert_allclose(full, own, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(compact.through, kernel.T @ other @ kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(compact.diagonal, np.diag(other), rtol=1e-4, atol=1e-5)
        assert moment.count == (B * T if mask is None else mask.sum())
    q, k = ("layers/q/kernel", "layers/k/kernel") if scanned else (
        "layers_0/q/kernel", "layers_0/k/kernel"
    )  # fmt: skip
    assert moments[q].sum is moments[k].sum


@pytest.mark.parametrize("weighting", ["one_sided", "two_sided"])
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_emulators_are_those_of_full_moments(scanned, weighting):
    made = {}
    for form in ("full", "compact"):
        params, kernels, moments = run(scanned, moments=form, gradients=weighting == "two_sided")
        for options in (dict(ratios=0.7), dict(energy=0.9), dict(budget=900)):
            made[form, *options] = compress(params, moments, kernels=kernels, **options)
    for options in ("ratios", "energy", "budget"):
        (_, one), (_, two) = made["full", options], made["compact", options]
        assert one.ranks == two.ranks
        for first, second in zip(one, two, strict=True):
            if first.rank is not None:
                figures = [(k.calibration_error, k.weighted_error) for k in (first, second)]
                np.testing.assert_allclose(*figures, rtol=1e-3, atol=1e-4)


class Heads(nn.Module):
    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return sum(jnp.sum(nn.Dense(n, name=f"d{n}_{i}")(x)) for i, n in enumerate(self.sizes))


@pytest.mark.parametrize(
    ("sizes", "compact"),
    [
        ((5, 5), True),
        ((6, 6), False),
        ((2, 8), False),
        ((2, 9), False),
        ((7,), True),
        ((8,), False),
    ],
)
def test_kernels_with_one_input_are_compact_together_or_share_a_full_sum(sizes, compact):
    model, x = Heads(sizes), jax.random.normal(jax.random.key(0), (20, 8))
    params = model.init(jax.random.key(1), x)["params"]
    kernels = find_kernels(model.apply, params, x)
    moments = calibrate(model.apply, params, [x], kernels=kernels, moments="compact")
    first = next(iter(moments.values()))
    for moment in moments.values():
        assert isinstance(moment.sum, CompactMoment) == compact
        assert moment.count is first.count
        if compact:
            assert moment.sum.diagonal is first.sum.diagonal
        else:
            assert moment.sum is first.sum


def test_auto_is_compact_beyond_a_width(monkeypatch):
    _, _, kernels, _ = make_tower()
    assert compact_sides(kernels, "auto") == compact_sides(kernels, "full") == (set(), set())
    monkeypatch.setattr(_moment_forms, "AUTO_WIDTH", H - 1)
    sides = compact_sides(kernels, "auto")
    assert sides.inputs == {f"layers_{i}/o/kernel" for i in range(LAYERS)}
    assert sides.gradients == {f"layers_{i}/{n}/kernel" for i in range(LAYERS) for n in "qk"}
    with pytest.raises(ConfigError, match="'small' is none of"):
        compact_sides(kernels, "small")  # pyright: ignore[reportArgumentType]


def test_sums_take_the_smaller_side_squared():
    wide, narrow = 64, 8

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(narrow, name="down")(nn.Dense(wide, name="up")(x))

    model, x = Mlp(), jnp.ones((4, narrow))
    params = model.init(jax.random.key(1), x)["params"]
    kernels = find_kernels(model.apply, params, x)
    sizes = {
        "full": 2 * (wide**2 + narrow**2) + 2,
        "compact": 2 * (narrow**2 + narrow**2 + wide) + 2,
    }
    for form, numbers in sizes.items():
        taps = Taps(kernels, gradients=True, moments=form)  # pyright: ignore[reportArgumentType]
        sums = jax.eval_shape(taps.zeros)
        assert sum(leaf.size for leaf in jax.tree.leaves(sums)) == numbers
        step = calibration_step(lambda v, b: jnp.sum(model.apply(v, b) ** 2), taps, mask=None)
        memory = step.lower(params, sums, x).compile().memory_analysis()  # pyright: ignore[reportFunctionMemberAccess]
        assert memory.alias_size_in_bytes == 4 * numbers  # updated in place
        if form == "compact":  # nothing of the larger side squared is made on the way either
            assert memory.temp_size_in_bytes < 4 * wide**2


def test_files_merging_and_fingerprint(tmp_path):
    _, _, one = run(moments="compact")
    _, _, two = run(moments="compact", shift=1.0)
    save_moments(tmp_path / "m", one)
    loaded = load_moments(tmp_path / "m")
    assert jax.tree.structure(loaded) == jax.tree.structure(one)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded["layers_0/q/kernel"].sum is loaded["layers_0/k/kernel"].sum
    assert calibration_fingerprint(loaded) == calibration_fingerprint(one)
    assert calibration_fingerprint(two) != calibration_fingerprint(one)

    model, params, kernels, x = make_tower()
    loss = lambda variables, x: jnp.sum(model.apply(variables, x) ** 2)  # noqa: E731
    options = dict(kernels=kernels, gradients=True, moments="compact")
    whole = calibrate(loss, params, [x, x + 1.0], **options)
    merged = merge_moments(loaded, two)
    for path in kernels:
        for name, array in moment_arrays(whole[path]).items():
            np.testing.assert_allclose(moment_arrays(merged[path])[name], array, rtol=1e-5)
    assert merged["layers_0/q/kernel"].sum is merged["layers_0/k/kernel"].sum


def test_different_forms_do_not_merge():
    _, _, compact = run(moments="compact")
    _, _, full = run(moments="full")
    with pytest.raises(MomentShapeError, match=r"head/kernel.*same `moments`"):
        merge_moments(compact, full)


def test_compact_moments_of_another_kernel_are_refused():
    params, kernels, moments = run(moments="compact")
    path = "layers_0/o/kernel"
    other = SecondMoment(CompactMoment(jnp.eye(D + 1), jnp.ones(H)), jnp.float32(1))
    with pytest.raises(MomentShapeError, match=r"sum\.through.*another model"):
        compress(params, moments | {path: other}, kernels=kernels, ratios=0.5,
                 weighting="one_sided")  # fmt: skip
    zero = jax.tree.map(jnp.zeros_like, moments[path])
    with pytest.raises(NoTokensError, match="is zero"):
        compress(params, moments | {path: zero}, kernels=kernels, ratios=0.5)


def test_the_weighted_correction_needs_full_moments():
    params, kernels, moments = run(moments="compact")
    emulator, _ = compress(params, moments, kernels=kernels, ratios=0.7)
    adapters = init_adapters(
        jax.random.key(0), kernels, where="layers_./o/kernel", rank=2, alpha=2.0
    )
    with pytest.raises(MomentShapeError, match=r"compact.*moments='full'"):
        correct(adapters, params, emulator, moments=moments)
