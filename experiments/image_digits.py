"""EMLoC on a small ViT that classifies scikit-learn's digits.

    OPENBLAS_NUM_THREADS=1 python experiments/image_digits.py --output runs/image_digits
    python experiments/image_digits.py --output runs/image_digits --table

The model is trained from scratch on 1,000 of the 1,797 handwritten digits (8 by 8 pixels), shifted
and scaled at random. It is then fine-tuned on 200 of the other digits as it has never seen them,
dark on bright and over stripes, and tested on the 597 that are left. Each seed draws its own rows,
calibration and initialization. About two minutes of two cores, and three more for each seed.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from story import ROWS, Programs, Story, pretrained, print_some, run_rows, table

from emloc_jax.kernels import find_kernels
from emloc_jax.models import VisionConfig, VisionEncoder
from emloc_jax.training import (
    evaluate_labels,
    init_state,
    make_label_logits,
    make_label_loss,
    make_schedule,
    make_train_step,
    train,
)

CONFIG = VisionConfig(
    hidden_size=64,
    intermediate_size=192,
    num_layers=4,
    num_heads=4,
    image_size=(10, 10),
    patch_size=(2, 2),
    num_channels=1,
    initializer_range=0.1,
).with_labels(10)
BLOCKS = "layers/.*"
SEEN = 1000  # digits of the pre-training


def digits():
    """(1797, 8, 8) from 0 to 1 and their classes, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return images.reshape(-1, 8, 8)[order] / 16, labels[order]


def framed(images, rng):
    """Each image somewhere on a field of 10 by 10, its strokes lighter or darker."""
    fields = np.zeros((len(images), 10, 10))
    for field, image in zip(fields, images, strict=True):
        down, right = rng.integers(0, 3, 2)
        field[down : down + 8, right : right + 8] = image * rng.uniform(0.7, 1.1)
    return fields


def inverted(images, rng):
    """The new kind of image: dark on bright, over stripes."""
    down, right = np.mgrid[:10, :10]
    fields = framed(images, rng)
    stripes = 0.3 * ((down + right + rng.integers(0, 4, (len(images), 1, 1))) % 4 < 2)
    return 1 - np.maximum(fields, stripes) + rng.normal(0, 0.05, fields.shape)


def batch_of(fields, labels, size):
    """A batch; rows that are missing are zeros of weight 0."""
    lacking = size - len(labels)
    pixels = np.pad(2 * fields - 1, ((0, lacking), (0, 0), (0, 0)))
    return {
        "pixels": pixels[..., None].astype(np.float32),
        "labels": np.pad(labels, (0, lacking)).astype(np.int32),
        "weights": (np.arange(size) < len(labels)).astype(np.float32),
    }


class Stream:
    """An endless stream of batches, each drawn from its own number."""

    def __init__(self, images, labels, change, *, size, seed):
        self.images, self.labels, self.change = images, labels, change
        self.size, self.seed = size, seed

    def __iter__(self):
        number = 0
        while True:
            rng = np.random.default_rng([self.seed, number])
            rows = rng.integers(0, len(self.labels), self.size)
            yield batch_of(self.change(self.images[rows], rng), self.labels[rows], self.size)
            number += 1


def pass_over(images, labels, seed, size=100):
    """One pass over changed images."""
    fields = inverted(images, np.random.default_rng(seed))
    starts = range(0, len(labels), size)
    return [batch_of(fields[at : at + size], labels[at : at + size], size) for at in starts]


class DigitStory(Story):
    """Accuracy beside the loss."""

    def __init__(self, programs, params, seed):
        images, labels = (part[SEEN:] for part in digits())
        order = np.random.default_rng([seed, 1]).permutation(len(labels))
        own, held = order[:200], order[200:]
        data = (
            Stream(images[own], labels[own], inverted, size=32, seed=seed),
            pass_over(images[own], labels[own], [seed, 2]),
            pass_over(images[held], labels[held], [seed, 3]),
        )
        kernels = find_kernels(programs.model.apply, params, data[1][0]["pixels"])
        super().__init__(programs, params, kernels, seed, data)
        self.logits = make_label_logits(programs.apply)

    def measure(self, params):
        report = evaluate_labels(self.logits, params, self.test, metrics=["accuracy"])
        return {"loss": report.loss} | report.scores


def base(args, model):
    """The model that is fine-tuned, from its file, or trained now and kept."""
    images, labels = (part[:SEEN] for part in digits())
    stream = Stream(images, labels, framed, size=64, seed=99)
    pixels = np.zeros((1, *CONFIG.image_size, 1), np.float32)

    def fit(params):
        tx = optax.adamw(make_schedule(args.pretrain_rate, steps=args.pretrain_steps, warmup=50))
        loss = make_label_loss(make_label_logits(model.apply))
        step, state = make_train_step(loss, tx), init_state(params, tx)
        steps = args.pretrain_steps
        return train(step, state, stream, steps=steps, callbacks=[print_some]).state.trainables

    file = args.output / "pretrained.npz"
    return pretrained(file, lambda: model.init(jax.random.key(0), pixels)["params"], fit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=1000)
    parser.add_argument("--pretrain-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=400, help="of LoRA")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    file = args.output / "rows.jsonl"
    if not args.table:
        args.output.mkdir(parents=True, exist_ok=True)
        model = VisionEncoder(CONFIG, scan_layers=True)
        params = base(args, model)
        programs = Programs(
            model,
            lambda apply: make_label_loss(make_label_logits(apply)),
            mask=lambda batch: batch["weights"] > 0,
            where=[BLOCKS],
            steps=args.steps,
            rate=args.rate,
        )
        run_rows(file, args.seeds, args.rows, lambda seed: DigitStory(programs, params, seed))
    table(file)
    table(file, "accuracy", 3)


if __name__ == "__main__":
    main()
