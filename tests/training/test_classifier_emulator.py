"""Classifiers through an emulator: what padding counts, and what a step takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emloc_jax._program_memory import analysed
from emloc_jax.adapters import attach, init_whole
from emloc_jax.cli._data import token_mask
from emloc_jax.emulator import calibrate
from emloc_jax.kernels import find_kernels, intercept
from emloc_jax.memory._abstract_emulator import abstract_adapters, abstract_emulator
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._setting import Setting
from emloc_jax.models import Encoder, EncoderConfig, VisionConfig, VisionEncoder
from emloc_jax.training import (
    LabelledExample,
    init_state,
    make_label_logits,
    make_label_loss,
    make_train_step,
    pad_labelled_examples,
)

LAYERS, HEAD = "layers/.*", "(pooler|classifier)/.*"


def test_padding_counts_in_no_moment_of_an_encoder():
    """Rows of 3 and 5 tokens, padded to 5 and to 8 and by a row of nothing: the same sums."""
    config = EncoderConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2
    ).with_labels(2)
    model = Encoder(config, scan_layers=True)
    rows = [
        LabelledExample(np.arange(1, n + 1, dtype=np.int32), None, np.int32(n % 2)[...], f"row {n}")
        for n in (3, 5)
    ]
    tokens = jnp.zeros((1, 5), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    kernels = find_kernels(model.apply, params, tokens)
    loss = make_label_loss(make_label_logits(intercept(model.apply)))

    def moments(length, size):
        return calibrate(
            lambda variables, batch: loss(variables["params"], batch)[0],
            params,
            [pad_labelled_examples(rows, length=length, batch_size=size)],
            kernels={path: spec for path, spec in kernels.items() if path.startswith("layers/")},
            mask=token_mask,
            gradients=True,
        )

    tight, loose = moments(5, 2), moments(8, 3)
    assert tight.keys() == loose.keys() and len(tight) == 6
    for path, moment in tight.items():
        assert np.unique(moment.count).tolist() == [8] == np.unique(loose[path].count).tolist()
        for name in ("sum", "gradient"):
            one, other = (np.asarray(getattr(m, name)) for m in (moment, loose[path]))
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("kind", ["text", "images"])
def test_training_on_the_emulator_takes_less_than_running_the_original(kind):
    """By the compiler's own figures, head and all; nothing is allocated."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    sizes = dict(hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=4)
    if kind == "text":
        config = EncoderConfig(vocab_size=64, **sizes).with_labels(4)
        model = Encoder(config, scan_layers=True, remat=True)
        batch = {name: shape((1, 16)) for name in ("tokens", "positions", "segments")}
        inputs = batch
    else:
        config = VisionConfig(image_size=(32, 32), patch_size=(8, 8), **sizes).with_labels(4)
        model = VisionEncoder(config, scan_layers=True, remat=True)
        inputs = {"pixels": shape((1, 32, 32, 3), dtype=jnp.float32)}
    batch = {**inputs, "labels": shape((1,)), "weights": shape((1,), dtype=jnp.float32)}
    params = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    kernels = find_kernels(model.apply, params, **inputs)
    abstract: AbstractModel = AbstractModel("tiny", model, params, kernels)  # pyright: ignore
    setting = Setting(ratio=0.25, where=(LAYERS,), lora_where=(LAYERS,), lora_rank=4)
    logits, tx = make_label_logits(intercept(model.apply)), optax.adam(0.1)
    step = make_train_step(
        make_label_loss(logits), tx, combine=lambda a, frozen, key: attach(frozen, a)
    )
    where = HEAD if kind == "text" else "classifier/.*"
    head = jax.eval_shape(lambda params: init_whole(params, where=where), params)
    trainables = {**abstract_adapters(abstract, setting), **head}
    state = jax.eval_shape(lambda a: init_state(a, tx), trainables)
    training = analysed(step.lower(state, abstract_emulator(abstract, setting), batch)).peak
    assert training < analysed(jax.jit(logits).lower(params, batch)).peak
