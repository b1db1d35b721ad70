"""EMLoC on a FLUX-shaped model: what a LoRA trained on an emulator is worth for pictures.

    OPENBLAS_NUM_THREADS=1 python experiments/flux_shapes.py --output runs/flux_shapes
    python experiments/flux_shapes.py --output runs/flux_shapes --table

A small FLUX transformer is trained from scratch on drawn pictures: shapes of several colours in
three styles, each word of the prompt a fixed random vector, without text encoder and autoencoder
(4 by 4 pixels are a token). It is then fine-tuned, DreamBooth's way, on a few pictures of a style
that it has never seen, and judged on other shapes and colours in that style: the flow-matching loss
with the same noise and times for all rows, and samples. Pre-training is done once, and takes about
five minutes of one core; each seed, which draws its own pictures, calibration and initialization,
takes about three. Results are appended one by one, and a second call goes on where the first
stopped.

Gain retention = (zero-shot - method) / (zero-shot - LoRA on the original).
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax
from story import ROWS, Programs, Story, pretrained, print_some, run_rows, table

from emloc_jax.kernels import find_kernels
from emloc_jax.models import Flux, FluxConfig, grid_ids, pack_latents, unpack_latents
from emloc_jax.training import (
    FlowBatches,
    LatentData,
    euler_sample,
    flow_velocity,
    init_state,
    make_flow_loss,
    make_schedule,
    make_train_step,
    sampling_times,
    train,
)

CONFIG = FluxConfig(
    in_channels=48,
    out_channels=48,
    num_layers=2,
    num_single_layers=4,
    head_dim=24,
    num_heads=4,
    prompt_dim=32,
    pooled_dim=32,
    axes_dims=(8, 8, 8),
)
SIZE, GRID = 16, 4  # pixels and tokens on a side
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "bar")
COLOURS = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.8, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "magenta": (0.85, 0.2, 0.8),
    "cyan": (0.1, 0.8, 0.85),
}
STYLES = ("dark", "light", "framed")
NEW = "striped outline"
PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]
BLOCKS = "(double|single)_layers/.*"


def words():
    """A fixed random vector of every word."""
    names = (*SHAPES, *COLOURS, *STYLES, NEW)
    vectors = np.random.default_rng(7).normal(size=(len(names), CONFIG.prompt_dim))
    return dict(zip(names, vectors.astype(np.float32), strict=True))


def inside(shape, x, y, radius):
    """How far a point lies within a shape, in pixels; negative outside."""
    if shape == "circle":
        return radius - np.hypot(x, y)
    if shape == "square":
        return 0.85 * radius - np.maximum(abs(x), abs(y))
    if shape == "triangle":
        return np.minimum(0.6 * radius - y, 0.5 * (y + radius) - 0.87 * abs(x))
    if shape == "cross":
        arm = np.minimum(radius - abs(x), 0.35 * radius - abs(y))
        return np.maximum(arm, np.minimum(radius - abs(y), 0.35 * radius - abs(x)))
    if shape == "diamond":
        return 0.7 * (radius - abs(x) - abs(y)) + 0.2
    return np.minimum(radius - abs(x), 0.4 * radius - abs(y))  # a bar


def draw(shape, colour, style, rng, fine=4):
    """(SIZE, SIZE, 3) in [-1, 1], averaged over `fine` by `fine` points of each pixel."""
    places = (np.arange(SIZE * fine) + 0.5) / fine - SIZE / 2
    x, y = np.meshgrid(places, places)
    dx, dy = rng.uniform(-1.5, 1.5, 2)
    depth = inside(shape, x - dx, y - dy, rng.uniform(4.5, 5.8))[..., None]
    paint = np.array(COLOURS[colour])
    if style == NEW:
        stripes = np.floor((x + y) / 3)[..., None] % 2
        picture = np.where(stripes > 0, [0.75, 0.7, 0.6], [0.35, 0.3, 0.4])
        picture = np.where((depth > 0) & (depth < 1.6), paint, picture)
    else:
        picture = np.full((*x.shape, 3), 0.85 if style == "light" else 0.1)
        if style == "framed":
            picture[np.maximum(abs(x), abs(y)) > SIZE / 2 - 1.5] = 0.6
        picture = np.where(depth > 0, paint, picture)
    return 2 * picture.reshape(SIZE, fine, SIZE, fine, 3).mean(axis=(1, 3)) - 1


def fold(pictures):
    """Two by two pixels into the channels, as an autoencoder's latents are smaller, then packed."""
    latents = pack_latents(pictures).reshape(-1, SIZE // 2, SIZE // 2, 12)
    return pack_latents(latents).astype(np.float32)


def unfold(tokens):
    latents = unpack_latents(np.asarray(tokens), GRID, GRID)
    return unpack_latents(latents.reshape(-1, (SIZE // 2) ** 2, 12), SIZE // 2, SIZE // 2)


def data_of(prompts, seed):
    """Pictures of prompts (shape, colour, style), with positions and sizes drawn from a seed."""
    rng, vectors = np.random.default_rng(seed), words()
    embeds = np.stack([[vectors[word] for word in prompt] for prompt in prompts])
    pictures = np.stack([draw(*prompt, rng) for prompt in prompts])
    return LatentData(fold(pictures), embeds, embeds.mean(axis=1), grid_ids(GRID, GRID))


class FluxStory(Story):
    """Pictures of held-out prompts beside the loss, from the same noise for every row."""

    def __init__(self, programs, params, seed, args):
        self.args = args
        order = np.random.default_rng(seed).permutation(len(PAIRS))
        known, held = order[: args.pictures], order[args.pictures :]
        self.held = [(*PAIRS[i], NEW) for i in held]
        even = {"batch_size": 24, "sampling": "stratified"}
        pictures = data_of([(*PAIRS[i], NEW) for i in known], [seed, 1])
        test = data_of(4 * self.held, [seed, 2])
        data = (
            FlowBatches(pictures, batch_size=16, seed=seed),
            list(FlowBatches(pictures, seed=seed, epochs=args.calibration, **even)),
            list(FlowBatches(test, seed=12345, epochs=args.test_epochs, **even)),
        )
        kernels = find_kernels(programs.model.apply, params, *shapes_of(data[1][0]))
        super().__init__(programs, params, kernels, seed, data)
        times = sampling_times(args.sampling_steps)
        self.sample = jax.jit(
            lambda params, conditions, noise: euler_sample(
                flow_velocity(programs.apply, params, conditions), noise, times
            )
        )

    def look(self, params, name):
        data = data_of(self.held[: self.args.samples], 0)
        conditions = {
            key: getattr(data, key)
            for key in ("prompt_embeds", "pooled_prompt_embeds", "image_ids")
        }
        noise = np.random.default_rng(1).standard_normal(data.latents.shape, np.float32)
        found = self.sample(params, conditions, noise)
        folder = self.args.output / "samples"
        folder.mkdir(exist_ok=True)
        for key, tokens in {name: found, "truth": data.latents}.items():
            np.save(folder / f"{self.seed} {key}.npy", unfold(tokens).astype(np.float16))


def shapes_of(batch):
    """What `Flux` is called on, as shapes."""
    names = ("latents", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "image_ids")
    return [jax.ShapeDtypeStruct(batch[name].shape, batch[name].dtype) for name in names]


def base(args, model):
    """The model that is fine-tuned, from its file, or trained now and kept."""
    prompts = [(*pair, style) for pair in PAIRS for style in STYLES]
    stream = FlowBatches(data_of(args.copies * prompts, 99), batch_size=args.pretrain_batch)
    inputs = [np.zeros(shape.shape, shape.dtype) for shape in shapes_of(stream.batch(0))]

    def fit(params):
        tx = optax.adamw(make_schedule(args.pretrain_rate, steps=args.pretrain_steps, warmup=20))
        step, state = make_train_step(make_flow_loss(model.apply), tx), init_state(params, tx)
        steps = args.pretrain_steps
        return train(step, state, stream, steps=steps, callbacks=[print_some]).state.trainables

    file = args.output / "pretrained.npz"
    return pretrained(file, lambda: model.init(jax.random.key(0), *inputs)["params"], fit)


def run(args):
    args.output.mkdir(parents=True, exist_ok=True)
    model = Flux(CONFIG, scan_layers=True)
    params = base(args, model)
    programs = Programs(
        model,
        make_flow_loss,
        mask=lambda batch: batch["weights"] > 0,
        where=[BLOCKS],
        steps=args.steps,
        rate=args.rate,
    )
    run_rows(
        args.output / "rows.jsonl",
        args.seeds,
        args.rows,
        lambda seed: FluxStory(programs, params, seed, args),
        after=lambda seed: figure(args.output, seed),
    )


def figure(folder, seed):
    """One row of samples for each way, one column for each held-out prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = ["truth", "zero-shot", "LoRA on the original"]
    order += [f"{row}, {way}" for row in ROWS for way in ("emulator", "uncorrected", "corrected")]
    files = [folder / "samples" / f"{seed} {name}.npy" for name in order]
    rows = {n: np.load(f) for n, f in zip(order, files, strict=True) if f.is_file()}
    columns = len(next(iter(rows.values())))
    size = (0.8 * columns + 2.6, 0.8 * len(rows))
    _, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(np.clip((picture.astype(np.float32) + 1) / 2, 0, 1))
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    plt.subplots_adjust(left=2.5 / size[0], right=0.99, top=0.99, bottom=0.01, hspace=0.05)
    plt.savefig(folder / f"samples_seed{seed}.png", dpi=110)
    plt.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--pretrain-batch", type=int, default=32)
    parser.add_argument("--pretrain-rate", type=float, default=2e-3)
    parser.add_argument("--copies", type=int, default=20, help="pictures of each prompt")
    parser.add_argument("--pictures", type=int, default=18, help="to fine-tune on")
    parser.add_argument("--steps", type=int, default=200, help="of LoRA")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--calibration", type=int, default=16, help="passes, each with own times")
    parser.add_argument("--test-epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        run(args)
    table(args.output / "rows.jsonl")


if __name__ == "__main__":
    main()
