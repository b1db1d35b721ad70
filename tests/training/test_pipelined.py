"""The pipelined trainer in the training loop: saved, resumed, interrupted."""

import os
import signal

import jax
import numpy as np
import pytest

from emloc_jax.errors import ResumeError
from emloc_jax.offload import FitOptions, PipelinedTrainer, PipelineOptions
from emloc_jax.training import Example, PipelinedStep, padded_batches, train
from tests.offload.pipeline_model import VOCABULARY, batch_of, head_loss, make_stack, tiny_model

MODEL, PARAMS = tiny_model()


def examples(count=16):
    generator = np.random.default_rng(0)
    made = []
    for number in range(count):
        row = generator.integers(1, VOCABULARY, 8).astype(np.int32)
        weights = np.array([0] + 6 * [1], np.float32)
        made.append(Example(row[:-1], row[1:], weights, f"row {number}"))
    return made


def run(folder, steps, *, resume=False, callbacks=(), subspace=0.5):
    trainer = PipelinedTrainer(
        make_stack(MODEL),
        PARAMS,
        head_loss(MODEL),
        next(iter(padded_batches(examples(), batch_size=4, seed=1))),
        options=PipelineOptions(
            learning_rate=1e-2,
            train=(("layers/mlp/.*/kernel", "subspace"), (".*/scale", "device")),
            subspace=subspace,
            nnz=2,
            fit=FitOptions(steps=3, threshold=0.05),
            refit_every=3,
        ),
        calibration=lambda step: batch_of(100 + step),
    )
    step = PipelinedStep(trainer)
    batches = padded_batches(examples(), batch_size=4, seed=1)
    with trainer:
        result = train(
            step,
            step.initial(),
            batches,
            steps=steps,
            folder=folder,
            resume=resume,
            save_every=100,
            callbacks=callbacks,
            snapshot=step.snapshot,
        )
        return jax.tree.map(np.array, trainer.params()), result


def test_interrupted_and_resumed_it_ends_with_the_same_bits(tmp_path):
    whole, _ = run(tmp_path / "whole", 7)

    def press(record):
        if record["step"] == 4:  # noted here, it takes effect when the next step is saved
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 7, callbacks=[press])
    resumed, result = run(tmp_path / "cut", 7, resume=True)
    assert result.resumed_from == 5
    assert [record["step"] for record in result.records] == [1, 2, 3, 4, 5, 6, 7]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_resumed_at_the_end_it_is_the_trained_model(tmp_path):
    trained, _ = run(tmp_path / "run", 2)
    resumed, result = run(tmp_path / "run", 2, resume=True)
    assert result.resumed_from == 2
    jax.tree.map(np.testing.assert_array_equal, resumed, trained)
    assert (
        np.abs(
            np.asarray(trained["layers"]["0"]["mlp"]["up_proj"]["kernel"])
            - PARAMS["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        ).max()
        > 1e-3
    )


def test_other_projectors_are_refused(tmp_path):
    run(tmp_path / "run", 2)
    with pytest.raises(ResumeError, match="other trainables"):
        run(tmp_path / "run", 4, resume=True, subspace=0.25)
