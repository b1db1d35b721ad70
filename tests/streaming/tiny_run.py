"""A tiny checkpoint, calibration batches, and the emulator that is made of them in memory."""

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.checkpoints import calibration_fingerprint, load_pretrained, save_emulator
from emloc_jax.emulator import calibrate, compress
from emloc_jax.kernels import find_kernels, intercept, select
from emloc_jax.training import make_loss

CHUNK = 8


def batch(generator, rows, length, vocabulary=48):
    tokens = generator.integers(1, vocabulary, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[0, length - 3 :] = 0
    return dict(
        tokens=tokens,
        targets=np.roll(tokens, -1, 1),
        weights=(segments > 0).astype(np.float32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments=segments,
    )


def batches():
    generator = np.random.default_rng(0)
    return [batch(generator, *shape) for shape in [(3, 7), (3, 7), (2, 9)]]


def opened(folder, *, abstract=False, scan_layers=True, compute_dtype="float32", dtype=None):
    return load_pretrained(
        folder,
        abstract=abstract,
        scan_layers=scan_layers,
        remat=True,
        compute_dtype=jnp.dtype(compute_dtype),
        dtype=dtype,
        tokenizer=False,
    )


def layer_kernels_of(base, where="layers/.*"):
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    found = find_kernels(base.model.apply, base.params, tokens)
    return {path: found[path] for path in select(where, found)}


def in_memory(folder, base, data, *, weighting, where="layers/.*", moments="auto", **options):
    """The emulator folder that the whole model gives."""
    kernels = layer_kernels_of(base, where)
    apply = intercept(base.model.apply)
    loss = make_loss(apply, chunk=CHUNK)

    def hidden(variables, b):
        places = dict(positions=b["positions"], segments=b["segments"])
        return apply(variables, b["tokens"], **places, method="hidden")

    form, moments = moments, None
    if weighting != "plain":
        gradients = weighting == "two_sided"
        fn = (lambda v, b: loss(v["params"], b)[0]) if gradients else hidden
        moments = calibrate(
            fn,
            base.params,
            data,
            kernels=kernels,
            mask=lambda b: b["segments"] > 0,
            gradients=gradients,
            moments=form,
        )
    emulator, report = compress(
        base.params, moments, kernels=kernels, weighting=weighting, **options
    )
    save_emulator(
        folder,
        emulator,
        report,
        base=base,
        rules={"note": "same"},
        weighting=weighting,
        calibration=None if moments is None else calibration_fingerprint(moments),
        seed=3,
    )
    return moments, emulator


def same_folder(first, second):
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    return [n for n in names if (first / n).read_bytes() != (second / n).read_bytes()]
