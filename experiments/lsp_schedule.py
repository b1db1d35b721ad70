"""The layer-wise schedule on a simulated commodity link: every schedule against native Adam.

    python experiments/lsp_schedule.py --output lsp_schedule

Two parts. `replay`: 32 blocks whose times on every lane are those of llama-7B on an RTX 4090
(LSP-Offload, arXiv 2406.10181, table 1: forward 12.2 ms, backward 28.1 ms, Adam on the host 60 ms
for a full block) and a link of 16 GB/s each way, slept away in the real lanes, threads and queues
of the trainer on a toy model. `compute`: a Llama-shaped model of 8 blocks of width 512 really
computed, over a link of the same ratio of bytes to compute. Prints iteration time, ratio to native
and the prediction of the cost model; writes a timeline (PNG and Chrome trace) of each schedule into
the new folder. Ten minutes on two CPU cores.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.kernels import intercept
from emloc_jax.models import Decoder, DecoderConfig, block_stack
from emloc_jax.offload import (
    SCHEDULES,
    BlockShape,
    DevicePutLink,
    FitOptions,
    Hardware,
    PipelinedTrainer,
    PipelineOptions,
    Setting,
    SimulatedLink,
    Timeline,
    Workload,
    draw_timeline,
    measured_times,
    predict,
    simulated_seconds,
    summarize,
    write_trace,
)
from emloc_jax.training import make_head_loss

LINK = 16e9
TITLES = {
    "native": "native: Adam on the device",
    "offload": "offload: full gradients, Adam on the host",
    "offload_delayed": "offload_delayed: the same, one step late",
    "layerwise": "layerwise: full gradients, layer by layer",
    "lsp_serial": "lsp_serial: compressed gradients, one thing after another",
    "lsp": "lsp: compressed gradients, layer by layer",
}


def llama_7b(blocks=32):
    """Kernels of llama-7B, and the times of table 1."""
    kernels = ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),)
    block = BlockShape(kernels)
    machine = Hardware(
        to_host=LINK,
        to_device=LINK,
        host_adam=block.elements / 0.060,
        device_adam=block.elements / 0.001,
        forward_seconds=0.0122,
        backward_seconds=0.0281,
    )
    return machine, Workload((block,) * blocks, tokens=2048)


def model_of(width, layers, heads, ffn, vocabulary):
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
    )
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, params


def batch_of(seed, rows, length, vocabulary):
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (rows, length + 1))
    tokens = tokens.astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
    }


def trainer_of(model, params, batch, schedule, *, options, link, delay=None, timeline):
    extra = {} if delay is None else {"delay": delay}
    return PipelinedTrainer(
        block_stack(model, wrap=intercept),
        params,
        make_head_loss(intercept(model.apply)),
        batch,
        schedule=schedule,
        options=options,
        calibration=lambda step: batch,
        link=link,
        timeline=timeline,
        **extra,
    )


def run(trainer, timeline, batch, steps):
    """Seconds per step in the steady state: neither compilation nor the first and last step."""
    with trainer:
        trainer.step(batch)  # compiles, and fits projectors
        trainer.drain()
        timeline.clear()
        for _ in range(steps + 2):
            trainer.step(batch)
        trainer.drain()
    return summarize(timeline).mean.seconds


def report(output, part, rows, timelines):
    """The table, and pictures of equal length."""
    native, longest = rows["native"][0], max(seconds for seconds, _ in rows.values())
    print(f"\n**{part}**\n")
    print("| schedule | seconds per step | ratio to native | predicted | bytes to host |")
    print("| --- | --- | --- | --- | --- |")
    for name, (seconds, predicted) in rows.items():
        timeline = timelines[name]
        mean = summarize(timeline).mean
        print(
            f"| {name} | {seconds:.3f} | {seconds / native:.2f} | {predicted:.3f} "
            f"({100 * (predicted / seconds - 1):+.1f} %) | {mean.bytes_to_host:,.0f} |"
        )
        steps = sorted({span.step for span in timeline.spans})[1:3]
        title = f"{TITLES[name]}; {seconds:.2f} s per step"
        picture = output / f"{part}_{name}.png"
        draw_timeline(timeline, picture, steps=steps, seconds=1.02 * longest, title=title)
        write_trace(timeline, output / f"{part}_{name}.json")


def replay(output, steps):
    """Times of llama-7B on the lanes of a toy model."""
    machine, workload = llama_7b()
    setting = Setting(2048, nnz=8, wire="float32")
    model, params = model_of(16, len(workload.blocks), 2, 16, 32)
    batch = batch_of(0, 1, 4, 32)
    options = PipelineOptions(subspace=0.5, nnz=2, fit=FitOptions(steps=1, threshold=1e9))
    rows, timelines = {}, {}
    for name in SCHEDULES:
        prediction = predict(machine, workload, name, setting)
        times = prediction.times
        by_name = {
            ("device", "forward"): times.forward,
            ("device", "backward"): times.backward + times.compress + times.update,
            ("device", "apply"): times.apply,
            ("d2h", "download"): times.d2h,
            ("host", "adam"): times.host,
            ("h2d", "upload"): times.h2d,
        }

        def delay(lane, step, block, name, by_name=by_name):
            return by_name.get((lane, name), np.zeros(block + 1))[block]

        timelines[name] = Timeline()
        trainer = trainer_of(
            model, params, batch, name, options=options, link=DevicePutLink(), delay=delay,
            timeline=timelines[name],
        )  # fmt: skip
        rows[name] = run(trainer, timelines[name], batch, steps), prediction.seconds
    report(output, "replay", rows, timelines)


def compute(output, steps):
    """A model that is really computed; the link is as slow for it as 16 GB/s for a 4090."""
    model, params = model_of(512, 8, 8, 1408, 4096)
    batch = batch_of(0, 4, 128, 4096)
    options = PipelineOptions(subspace=0.5, nnz=4, fit=FitOptions(steps=20, threshold=0.6))
    rows, timelines, link = {}, {}, None
    for name in SCHEDULES:
        timelines[name] = Timeline()
        trainer = trainer_of(
            model, params, batch, name, options=options, link=link or DevicePutLink(),
            timeline=timelines[name],
        )  # fmt: skip
        seconds = run(trainer, timelines[name], batch, steps)
        predicted = simulated_seconds(measured_times(timelines[name]), name)
        rows[name] = seconds, predicted
        if name == "native":
            # As in the other part: llama-7B's gradients in fp32 take 26 GB / 16 GB/s = 1.26 of
            # its 1.29 s of compute.
            kernels = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
            link = SimulatedLink(kernels / (1.26 * seconds))
            print(f"simulated link: {kernels / (1.26 * seconds) / 1e6:.1f} MB/s each way")
    report(output, "compute", rows, timelines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="new folder for pictures")
    parser.add_argument("--parts", nargs="+", default=["replay", "compute"])
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    parts = {"replay": replay, "compute": compute}
    for part in args.parts:
        parts[part](args.output, args.steps)


if __name__ == "__main__":
    main()
