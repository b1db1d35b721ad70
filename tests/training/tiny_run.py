"""A tiny run with dropout-like noise, accumulation and packing; also a program to be killed.

    python -m tests.training.tiny_run FOLDER STEPS [pause seconds]

resumes if it can, and writes the final trainables to FOLDER/final.npz.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np

from emloc_jax.training import (
    init_state,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
    packed_batches,
    train,
)
from tests.training.toy import Toy, toy_examples, toy_params

LOSS = make_loss(Toy().apply, chunk=16)


def noisy_head(adapters, frozen, key):
    kernel = frozen["head"]["kernel"]
    kept = jax.random.bernoulli(key, 0.9, kernel.shape)
    return frozen | {"head": {"kernel": kernel + kept * adapters["head"]["delta"]}}


@functools.cache  # so that the tests of one process compile it once
def parts():
    schedule = make_schedule(0.05, steps=24, warmup=3)
    tx = make_optimizer(schedule, weight_decay=0.01)
    step = make_train_step(LOSS, tx, combine=noisy_head, accumulation=2, schedule=schedule)
    return tx, step, toy_params()


def tiny_run(folder, *, steps=24, resume=False, seed=0, examples=None, **options):
    tx, step, params = parts()
    adapters = {"head": {"delta": jax.numpy.zeros_like(params["head"]["kernel"])}}
    batches = packed_batches(examples or toy_examples(19), batch_size=4, length=16, seed=seed)
    return train(
        step,
        init_state(adapters, tx, seed=seed),
        batches,
        steps=steps,
        frozen=params,
        folder=folder,
        resume=resume,
        **({"save_every": 3, "config": {"seed": seed, "model": {"width": 8}}} | options),
    )


if __name__ == "__main__":
    target, last = Path(sys.argv[1]), int(sys.argv[2])
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    result = tiny_run(target, steps=last, resume=True, callbacks=[lambda _: time.sleep(pause)])
    np.savez(target / "final.npz", delta=np.asarray(result.state.trainables["head"]["delta"]))
