"""EMLoC on a small InternVL that answers questions about drawn pictures.

    OPENBLAS_NUM_THREADS=1 python experiments/image_questions.py --output runs/image_questions
    python experiments/image_questions.py --output runs/image_questions --table

Pictures of 32 by 32 pixels have four places, with a shape of some colour or nothing in each. A
small InternVL (image encoder, pixel shuffle, projector, decoder; words are tokens) is trained from
scratch to answer, in one word: which colour is the SHAPE, which shape is COLOUR, what is at PLACE,
how many. It is then fine-tuned on 1,280 pictures in another style (outlines on stripes), asked in
words that it has never read, and tested on new pictures of that kind. Everything is compressed and
gets adapters: image encoder, projector and decoder; `--where` says what instead. Pre-training takes
about ten minutes of two busy cores, and so does a seed.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flux_shapes import COLOURS, SHAPES, inside
from story import ROWS, Programs, Story, pretrained, print_some, run_rows, table

from emloc_jax.kernels import find_kernels
from emloc_jax.models import (
    DecoderConfig,
    InternVL,
    InternVLConfig,
    VisionConfig,
    image_token_masks,
)
from emloc_jax.training import (
    evaluate_loss,
    init_state,
    make_loss,
    make_schedule,
    make_train_step,
    train,
)

PLACES = ("above-left", "above-right", "below-left", "below-right")
COUNTS = ("one", "two", "three", "four")
KNOWN = ("which", "colour", "is", "the", "shape", "what", "at", "how", "many", "?")
NEW = ("quelle", "couleur", "a", "ceci", "forme", "quoi", "a-la-place", "combien", "!")
MARKS = ("<pad>", "<start>", "<img>", "<image>", "</img>", "nothing")
WORDS = (*MARKS, *SHAPES, *COLOURS, *PLACES, *COUNTS, *KNOWN, *NEW)
NUMBER = {word: number for number, word in enumerate(WORDS)}
CELL, LENGTH = 16, 26

CONFIG = InternVLConfig(
    VisionConfig(
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        model_type="internvl_vision",
        image_size=(2 * CELL, 2 * CELL),
        patch_size=(4, 4),
        final_norm=False,
        initializer_range=0.08,
    ),
    DecoderConfig(
        vocab_size=len(WORDS),
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        initializer_range=0.08,
    ),
    image_token_id=NUMBER["<image>"],
)
PARTS = ["vision/layers/.*", "projector/.*", "layers/.*"]


def scene(rng):
    """What is where: {place: (shape, colour)}, no shape and no colour twice."""
    count = rng.integers(1, 5)
    places = rng.permutation(4)[:count]
    shapes, colours = rng.permutation(SHAPES)[:count], rng.permutation(list(COLOURS))[:count]
    return {
        PLACES[place]: (str(shape), str(colour))
        for place, shape, colour in zip(places, shapes, colours, strict=True)
    }


def draw(things, rng, new, fine=3):
    """(32, 32, 3) in [-1, 1]; in the new style outlines on stripes."""
    points = (np.arange(CELL * fine) + 0.5) / fine - CELL / 2
    x, y = np.meshgrid(points, points)
    rows, columns = np.mgrid[: 2 * CELL * fine, : 2 * CELL * fine]
    stripes = ((rows + columns) // (3 * fine) % 2)[..., None]
    picture = (
        np.where(stripes, [0.75, 0.7, 0.6], [0.35, 0.3, 0.4])
        if new
        else np.full((*rows.shape, 3), 0.1)
    )
    for place, (shape, colour) in things.items():
        dx, dy = rng.uniform(-1.5, 1.5, 2)
        depth = inside(shape, x - dx, y - dy, rng.uniform(4.5, 5.8))[..., None]
        painted = (depth > 0) & (depth < 1.8) if new else depth > 0
        down, right = divmod(PLACES.index(place), 2)
        cell = (
            slice(down * CELL * fine, (down + 1) * CELL * fine),
            slice(right * CELL * fine, (right + 1) * CELL * fine),
        )
        picture[cell] = np.where(painted, COLOURS[colour], picture[cell])
    return 2 * picture.reshape(2 * CELL, fine, 2 * CELL, fine, 3).mean(axis=(1, 3)) - 1


def question(things, rng, new):
    """The words of a question about a picture, and the answer."""
    shape, colour = list(things.values())[rng.integers(len(things))]
    place = PLACES[rng.integers(4)]
    asked = [
        (["which", "colour", "is", "the", shape, "?"], ["quelle", "couleur", "a", shape, "!"]),
        (["which", "shape", "is", colour, "?"], ["quelle", "forme", "a", colour, "!"]),
        (["what", "is", "at", place, "?"], ["quoi", "a-la-place", place, "!"]),
        (["how", "many", "?"], ["combien", "!"]),
    ]
    answers = [colour, shape, things.get(place, ("nothing",))[0], COUNTS[len(things) - 1]]
    kind = rng.integers(4)
    return asked[kind][new], answers[kind]


def examples(count, seed, new):
    """Pictures (count, 32, 32, 3) and rows of words, the answer last."""
    rng = np.random.default_rng(seed)
    pictures, rows = np.zeros((count, 2 * CELL, 2 * CELL, 3), np.float32), []
    for row in range(count):
        things = scene(rng)
        pictures[row] = draw(things, rng, new)
        words, answer = question(things, rng, new)
        image = ["<image>"] * CONFIG.tile_tokens
        rows.append(["<start>", "<img>", *image, "</img>", *words, answer])
    return pictures, rows


def batch_of(pictures, rows):
    """A batch as the library makes it; the answer alone has weight."""
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    weights = np.zeros((len(rows), LENGTH), np.float32)
    for row, words in enumerate(rows):
        tokens[row, : len(words)] = [NUMBER[word] for word in words]
        weights[row, len(words) - 2] = 1  # where the answer is the target
    lengths = np.array([[len(words) - 1] for words in rows])  # the answer is not read
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    segments = (places < lengths).astype(np.int32)
    return {
        "tokens": tokens * segments,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": weights,
        "positions": places,
        "segments": segments,
        "pixels": pictures[:, None],
        "tiles": np.ones((len(rows), 1), np.int32),
    }


class Stream:
    """An endless stream of batches, each drawn from its own number."""

    def __init__(self, pictures, rows, *, size, seed):
        self.pictures, self.rows, self.size, self.seed = pictures, rows, size, seed

    def __iter__(self):
        number = 0
        while True:
            rng = np.random.default_rng([self.seed, number])
            picked = rng.integers(0, len(self.rows), self.size)
            yield batch_of(self.pictures[picked], [self.rows[row] for row in picked])
            number += 1


def pass_over(pictures, rows, size=64):
    """One pass; the rows that do not fill a batch are left out."""
    starts = range(0, len(rows) - size + 1, size)
    return [batch_of(pictures[at : at + size], rows[at : at + size]) for at in starts]


class QuestionStory(Story):
    """Accuracy of the answers beside the loss."""

    def __init__(self, programs, params, seed):
        own = examples(1280, [seed, 1], True)
        data = (
            Stream(*own, size=32, seed=seed),
            pass_over(*own)[:5],
            pass_over(*examples(384, [seed, 2], True)),
        )
        first = data[1][0]
        inputs = [first[name] for name in ("tokens", "positions", "segments", "pixels")]
        kernels = find_kernels(programs.model.apply, params, *inputs)
        kernels = {path: spec for path, spec in kernels.items() if path != "lm_head/kernel"}
        super().__init__(programs, params, kernels, seed, data)

    def measure(self, params):
        right = [hits(self.programs.apply, params, batch) for batch in self.test]
        loss = evaluate_loss(self.programs.loss, params, self.test).loss
        return {"loss": loss, "accuracy": float(np.mean(np.concatenate(right)))}


def hits(apply, params, batch):
    """(B,) whether the most likely word is the answer."""
    logits = run_model(apply, params, *(batch[name] for name in INPUTS))
    asked = batch["weights"] > 0
    return (np.asarray(logits).argmax(-1) == batch["targets"])[asked]


INPUTS = ("tokens", "positions", "segments", "pixels")
run_model = jax.jit(
    lambda apply, params, *inputs: apply({"params": params}, *inputs), static_argnums=0
)


def base(args, model):
    """The model that is fine-tuned, from its file, or trained now and kept."""
    stream = Stream(*examples(args.pictures, 99, False), size=args.pretrain_batch, seed=99)
    inputs = [jnp.zeros((1, LENGTH), jnp.int32)] * 3
    pixels = jnp.zeros((1, 1, 2 * CELL, 2 * CELL, 3))

    def fit(params):
        tx = optax.adamw(make_schedule(args.pretrain_rate, steps=args.pretrain_steps, warmup=50))
        step, state = make_train_step(make_loss(model.apply), tx), init_state(params, tx)
        steps = args.pretrain_steps
        return train(step, state, stream, steps=steps, callbacks=[print_some]).state.trainables

    file = args.output / "pretrained.npz"
    return pretrained(file, lambda: model.init(jax.random.key(0), *inputs, pixels)["params"], fit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--where", nargs="+", default=PARTS, help="what is compressed")
    parser.add_argument("--pretrain-steps", type=int, default=3000)
    parser.add_argument("--pretrain-batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=12000, help="of the pre-training")
    parser.add_argument("--pretrain-rate", type=float, default=1.5e-3)
    parser.add_argument("--steps", type=int, default=300, help="of LoRA")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    file = args.output / "rows.jsonl"
    if not args.table:
        args.output.mkdir(parents=True, exist_ok=True)
        model = InternVL(CONFIG, scan_layers=True)
        params = base(args, model)
        programs = Programs(
            model,
            make_loss,
            mask=image_token_masks,
            where=args.where,
            steps=args.steps,
            rate=args.rate,
        )
        run_rows(file, args.seeds, args.rows, lambda seed: QuestionStory(programs, params, seed))
    table(file)
    table(file, "accuracy", 3)


if __name__ == "__main__":
    main()
