"""Compression of small models: ranks, what stays whole, boxes, names, reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from emloc_jax.emulator import (
    calibrate,
    compress,
    factorize_kernels,
    load_factorizations,
    save_factorizations,
    truncate,
)
from emloc_jax.errors import RatioError, UnmatchedRuleError
from emloc_jax.kernels import LowRankKernel, find_kernels, get_leaf, intercept, materialize

from .towers import D, H, make_tower


@functools.cache
def calibrated(scanned=True, gradients=True, **kwargs):
    model, params, kernels, x = make_tower(scanned, **kwargs)
    fn = (lambda v, b: jnp.sum(model.apply(v, b) ** 2)) if gradients else model.apply
    moments = calibrate(fn, params, [x, 0.5 - x], kernels=kernels, gradients=gradients)
    return model, params, kernels, x, moments


def output_error(params, emulator, moment, path):
    """`||X (K - K_E)|| / ||X K||` in float64, over stacked kernels."""
    kernel, emulated = (
        np.float64(meta.unbox(materialize(get_leaf(tree, path)))) for tree in (params, emulator)
    )
    moment = np.float64(moment)

    def norm(matrix):
        return np.sqrt(np.sum(matrix * (moment @ matrix)))

    return norm(kernel - emulated) / norm(kernel)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_emulator_runs_fast_and_by_unboxing_and_its_report_is_true(scanned):
    model, params, kernels, x, moments = calibrated(scanned)
    emulator, report = compress(params, moments, kernels=kernels, ratios=0.7)
    assert report.weighting == "two_sided"
    boxed = intercept(model.apply)({"params": emulator}, x)
    plain = model.apply({"params": materialize(emulator)}, x)
    np.testing.assert_allclose(boxed, plain, atol=1e-5)
    for entry in report:
        leaf = get_leaf(emulator, entry.path)
        if entry.path == "head/kernel":
            assert (entry.status, entry.reason) == ("kept", "no rank makes it smaller")
            assert leaf is get_leaf(params, entry.path)
            continue
        assert entry.status == "compressed" and isinstance(leaf, LowRankKernel)
        assert entry.rank == int(D * H * 0.7 / (D + H)) == leaf.left.shape[-1]
        assert entry.bytes_after == leaf.left.nbytes + leaf.right.nbytes
        assert entry.bytes_before == get_leaf(params, entry.path).nbytes
        want = output_error(params, emulator, moments[entry.path].sum, entry.path)
        assert entry.calibration_error == pytest.approx(want, rel=1e-3)


def test_scanned_and_unrolled_towers_give_the_same_emulator():
    model, params, kernels, x, moments = calibrated(scanned=True)
    emulator, _ = compress(params, moments, kernels=kernels, ratios=0.7)
    unrolled = {f"layers_{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in (0, 1)}
    unrolled["head"] = params["head"]
    other = make_tower(scanned=False)
    fn = lambda v, b: jnp.sum(other[0].apply(v, b) ** 2)  # noqa: E731
    moments = calibrate(fn, unrolled, [x, 0.5 - x], kernels=other[2], gradients=True)
    expected, _ = compress(unrolled, moments, kernels=other[2], ratios=0.7)
    for i in (0, 1):
        for name in ("q", "k", "o"):
            stacked = emulator["layers"][name]["kernel"].unbox()[i]
            np.testing.assert_allclose(
                stacked, expected[f"layers_{i}"][name]["kernel"].unbox(), atol=1e-4
            )


def test_rules_skip_list_and_what_they_leave():
    _, params, kernels, _, moments = calibrated(scanned=False)
    rules = [(".*/o", 0.4), ("layers_0/.*", 0.7)]
    _, report = compress(params, moments, kernels=kernels, ratios=rules, skip="layers_0/k")
    assert report["layers_0/o/kernel"].rank == 1 and report["layers_0/q/kernel"].rank == 2
    assert report["layers_0/k/kernel"].status == "skipped"
    assert report["layers_1/q/kernel"].reason == "no rule matches it"
    assert [entry.path for entry in report] == list(kernels)


def test_energy_bounds_the_weighted_error_and_keeps_what_would_not_shrink():
    _, params, kernels, _, moments = calibrated()
    _, report = compress(params, moments, kernels=kernels, energy=0.6)
    for entry in report:
        if entry.status == "compressed":
            assert entry.weighted_error**2 <= 0.4 + 1e-5
    _, report = compress(params, moments, kernels=kernels, energy=0.9999999)
    entry = report["layers/q/kernel"]
    assert (entry.status, entry.rank, entry.ratio) == ("kept", None, 1.0)


@pytest.mark.parametrize("weighting", ["two_sided", "one_sided", "plain"])
def test_budget_is_kept_and_larger_budgets_are_better(weighting):
    _, params, kernels, _, moments = calibrated()
    some = {path: spec for path, spec in kernels.items() if path != "head/kernel"}
    full = factorize_kernels(params, moments, kernels=some, weighting=weighting)

    def run(budget):
        return compress(params, moments, kernels=kernels, budget=budget, factorizations=full)[1]

    whole, errors = 3 * 2 * D * H * 4, []
    for share in (0.5, 0.8):
        budget = int(share * whole)
        report = run(budget)
        assert sum(e.bytes_after for e in report if e.path != "head/kernel") <= budget
        errors.append(sum(e.weighted_error or 0 for e in report))
    assert errors[1] < errors[0]
    with pytest.raises(RatioError, match="rank 1 everywhere takes 336 bytes"):
        run(335)
    assert run(10**9).ratio == 1


def test_another_ratio_is_a_truncation(tmp_path):
    _, params, kernels, _, moments = calibrated()
    some = {path: spec for path, spec in kernels.items() if path != "head/kernel"}
    done = []
    full = factorize_kernels(params, moments, kernels=some, on_kernel=done.append)
    assert done == list(some)
    save_factorizations(tmp_path / "spectra.safetensors", full)
    full = load_factorizations(tmp_path / "spectra.safetensors")
    for ratio in (0.4, 0.7):
        direct, direct_report = compress(params, moments, kernels=kernels, ratios=ratio)
        again, report = compress(
            params, moments, kernels=kernels, ratios=ratio, factorizations=full
        )
        assert report.ranks == direct_report.ranks and report.weighting == "two_sided"
        by_hand = truncate(params, full, report.ranks, kernels=kernels)
        for one, two in zip(jax.tree.leaves(direct), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, again, by_hand)


def test_factors_take_the_dtype_of_their_kernel():
    _, params, kernels, x, _ = calibrated(gradients=False)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    model, *_ = make_tower(True)
    kernels = find_kernels(model.apply, params, x)
    emulator, report = compress(params, None, kernels=kernels, ratios=0.7)
    box = emulator["layers"]["q"]["kernel"]
    assert box.left.dtype == box.right.dtype == jnp.bfloat16
    assert report.weighting == "plain"
    assert report["layers/q/kernel"].bytes_after == 2 * 2 * 2 * (D + H)


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_sharding_names_move_to_the_factors(scanned):
    model, params, kernels, x, moments = calibrated(scanned, partitioned=True)
    emulator, _ = compress(params, moments, kernels=kernels, ratios=0.7)
    path, stack = ("layers/q/kernel", ("layers",)) if scanned else ("layers_0/q/kernel", ())
    box = get_leaf(emulator, path)
    assert box.left.names == (*stack, "embed", None)
    assert box.right.names == (*stack, None, "hidden")
    fast = intercept(model.apply)({"params": emulator}, x)
    np.testing.assert_allclose(fast, model.apply({"params": emulator}, x), atol=1e-5)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 16, name="embed")
        return embed.attend(nn.Dense(16, name="mix")(embed(tokens)))


def test_tied_embeddings_stay_whole_unless_asked_for():
    model, tokens = Tied(), jnp.arange(40).reshape(2, 20)
    params = model.init(jax.random.key(0), tokens)["params"]
    kernels = find_kernels(model.apply, params, tokens)
    _, report = compress(params, None, kernels=kernels, ratios={".*": 0.5})
    assert report["embed/embedding"].reason == "tied embedding"
    with pytest.raises(UnmatchedRuleError, match=r"'embed/.\*'.*tied embedding.*include_tied"):
        compress(params, None, kernels=kernels, ratios={"mix": 0.5, "embed/.*": 0.5})
    emulator, report = compress(params, None, kernels=kernels, ratios=0.5, include_tied=True)
    box = emulator["embed"]["embedding"]
    assert box.left.shape == (16, 5) and box.right.shape == (5, 40)
    fast = intercept(model.apply)({"params": emulator}, tokens)
    np.testing.assert_allclose(fast, model.apply({"params": emulator}, tokens), atol=1e-5)


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (8, 8))
        return jnp.einsum("bi,ij->bj", nn.Dense(8, name="known")(x), kernel)


def test_kernels_without_a_handler_are_reported_or_multiplied_out_on_request(caplog):
    model, x = Custom(), jnp.ones((3, 8))
    params = model.init(jax.random.key(0), x)["params"]
    kernels = find_kernels(model.apply, params, x)
    emulator, report = compress(params, None, kernels=kernels, ratios=0.5)
    assert report["kernel"].status == "unsupported" and "handler" in report["kernel"].reason
    assert "Custom" in caplog.text
    assert emulator["kernel"] is params["kernel"]
    emulator, report = compress(params, None, kernels=kernels, ratios=0.5, allow_materialize=True)
    assert report["kernel"].status == "compressed"
    want = x @ materialize(emulator)["known"]["kernel"] @ materialize(emulator)["kernel"]
    np.testing.assert_allclose(model.apply({"params": emulator}, x), want, atol=1e-5)


def test_sharded_parameters_give_the_same_emulator():
    _, params, kernels, _, moments = calibrated()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    specs = jax.sharding.PartitionSpec(None, "data", "model")
    layers = jax.tree.map(lambda a: a, params["layers"])
    sharding = jax.sharding.NamedSharding(mesh, specs)
    layers["q"]["kernel"] = jax.device_put(layers["q"]["kernel"], sharding)
    rules = {"layers/q": 0.7}
    one, _ = compress(params, moments, kernels=kernels, ratios=rules)
    two, _ = compress({**params, "layers": layers}, moments, kernels=kernels, ratios=rules)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_kernel_of_zeros_compresses_without_error():
    _, params, kernels, _, moments = calibrated()
    zeros = {**params["layers"], "q": jax.tree.map(jnp.zeros_like, params["layers"]["q"])}
    for options in ({"ratios": {"layers/q": 0.7}}, {"energy": {"layers/q": 0.7}}):
        _, report = compress({**params, "layers": zeros}, moments, kernels=kernels, **options)
        assert report["layers/q/kernel"].calibration_error == 0
