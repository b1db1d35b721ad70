"""Calibration against `X^T X` and `sum g g^T` by hand, through linen, scan and remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.emulator import calibrate, merge_moments
from emloc_jax.errors import MaskShapeError, NonFiniteError, NoTokensError, UnsupportedKernelError
from emloc_jax.kernels import find_kernels

from .towers import B, T, make_tower, moments_by_hand

MASK = np.arange(B * T).reshape(B, T) % 3 != 0


def loss_of(model):
    return lambda variables, batch: jnp.sum(model.apply(variables, batch["x"]) ** 2)


def measured(moments, scanned, layer, name):
    """Sum, count and gradient moment of one layer's kernel."""
    if scanned:
        moment = moments[f"layers/{name}/kernel"]
        return moment.sum[layer], moment.count[layer], moment.gradient[layer]
    moment = moments[f"layers_{layer}/{name}/kernel"]
    return moment.sum, moment.count, moment.gradient


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_moments_equal_those_by_hand(scanned, mask):
    model, params, kernels, x = make_tower(scanned)
    batch = {"x": x} if mask is None else {"x": x, "mask": mask}
    moments = calibrate(
        loss_of(model),
        params,
        [batch, batch],
        kernels=kernels,
        mask=None if mask is None else lambda batch: batch["mask"],
        gradients=True,
    )
    assert list(moments) == list(kernels)
    for (layer, name), (inputs, gradients) in moments_by_hand(params, scanned, x, mask).items():
        total, count, gradient = measured(moments, scanned, layer, name)
        np.testing.assert_allclose(total, 2 * inputs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, 2 * gradients, rtol=1e-4, atol=1e-5)
        assert count == 2 * (B * T if mask is None else mask.sum())


def test_kernels_with_one_input_share_one_sum():
    model, params, kernels, x = make_tower(scanned=True)
    moments = calibrate(model.apply, params, [x], kernels=kernels)
    assert moments["layers/q/kernel"].sum is moments["layers/k/kernel"].sum
    assert moments["layers/q/kernel"].gradient is None
    # Also when the kernel that discovery named the group after is not asked for.
    some = {path: kernels[path] for path in ("layers/q/kernel", "layers/o/kernel")}
    alone = calibrate(model.apply, params, [x], kernels=some)
    for path in some:
        np.testing.assert_array_equal(alone[path].sum, moments[path].sum)


def test_batches_of_one_shape_are_traced_once():
    model, params, kernels, x = make_tower()
    traces = []

    def counted(variables, batch):
        traces.append(batch.shape)
        return model.apply(variables, batch)

    calibrate(counted, params, [x, x + 1, x - 1], kernels=kernels)
    assert len(traces) == 1


def test_moments_of_parts_merge_to_those_of_the_whole():
    model, params, kernels, x = make_tower()
    batches = [{"x": x + i} for i in range(3)]

    def run(batches):
        return calibrate(loss_of(model), params, batches, kernels=kernels, gradients=True)

    whole = run(batches)
    merged = merge_moments(run(batches[2:]), run(batches[:1]), run(batches[1:2]))
    for path in kernels:
        for one, two in zip(
            jax.tree.leaves(whole[path]), jax.tree.leaves(merged[path]), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    assert merged["layers_0/q/kernel"].sum is merged["layers_0/k/kernel"].sum


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, name="embed")
        return embed.attend(nn.Dense(4, name="mix")(embed(tokens)))


def test_tied_embeddings_are_left_out_unless_asked_for():
    model, tokens = Tied(), jnp.array([[1, 2, 3]])
    params = model.init(jax.random.key(0), tokens)["params"]
    kernels = find_kernels(model.apply, params, tokens)
    assert set(calibrate(model.apply, params, [tokens], kernels=kernels)) == {"mix/kernel"}
    moments = calibrate(model.apply, params, [tokens], kernels=kernels, include_tied=True)
    assert moments["embed/embedding"].sum.shape == (4, 4)
    assert moments["embed/embedding"].count == 3
    tied = {"embed/embedding": kernels["embed/embedding"]}
    with pytest.raises(UnsupportedKernelError, match="include_tied"):
        calibrate(model.apply, params, [tokens], kernels=tied)


def test_no_batch_and_no_token_are_errors():
    model, params, kernels, x = make_tower(scanned=True)
    with pytest.raises(NoTokensError, match="no batch"):
        calibrate(model.apply, params, [], kernels=kernels)
    with pytest.raises(NoTokensError, match="no token reached .*layers/k/kernel"):
        calibrate(
            model.apply, params, [x], kernels=kernels, mask=lambda batch: np.zeros((B, T), bool)
        )


def test_a_kernel_that_does_not_run_is_named():
    model, params, kernels, x = make_tower()

    def first_layer_only(variables, batch):
        return model.apply(variables, batch, capture_intermediates=True)[1]["intermediates"][
            "layers_0"
        ]["__call__"][0][0]

    with pytest.raises(NoTokensError, match=r"layers_1/k/kernel.*\(3 of 5"):
        calibrate(first_layer_only, params, [x], kernels=kernels)


def test_numbers_that_are_not_finite_name_their_kernel():
    model, params, kernels, x = make_tower()
    params["layers_1"]["k"]["bias"] = params["layers_1"]["k"]["bias"].at[0].set(jnp.nan)
    with pytest.raises(NonFiniteError, match="layers_1/o/kernel"):
        calibrate(model.apply, params, [x], kernels=kernels)


def test_masked_tokens_may_hold_anything():
    model, params, kernels, x = make_tower()
    clean = calibrate(model.apply, params, [x], kernels=kernels, mask=lambda batch: MASK)
    dirty = calibrate(
        model.apply,
        params,
        [jnp.where(MASK[..., None], x, jnp.nan)],
        kernels=kernels,
        mask=lambda batch: MASK,
    )
    for path in kernels:
        np.testing.assert_array_equal(clean[path].sum, dirty[path].sum)


def test_outputs_that_cannot_be_differentiated_are_refused():
    model, params, kernels, x = make_tower()
    with pytest.raises(ValueError, match="scalar loss"):
        calibrate(model.apply, params, [x], kernels=kernels, gradients=True)
    with pytest.raises(ValueError, match="floats"):
        calibrate(lambda v, b: jnp.argmax(model.apply(v, b)), params, [x], kernels=kernels)


def test_mask_that_does_not_fit_is_refused():
    model, params, kernels, x = make_tower()
    with pytest.raises(MaskShapeError):
        calibrate(model.apply, params, [x], kernels=kernels, mask=lambda batch: np.ones((3, 4)))
