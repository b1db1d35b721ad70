"""One task of `lsp_gpu.py`, in a process of its own: `python lsp_gpu_runs.py '{"part": ...}'`.

Appends its records to the file of results, one line of JSON each.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from lsp_gpu_link import bandwidth
from lsp_gpu_model import (
    SHAPES,
    head_loss_of,
    link_named,
    make_model,
    options_of,
    random_batch,
    random_stack,
    workload_of,
)

from emloc_jax.errors import EmlocError
from emloc_jax.kernels import cache, lift_matrix, make_projector, project, to_dense
from emloc_jax.offload import (
    AdamOptions,
    FitOptions,
    Hardware,
    PipelinedTrainer,
    Setting,
    Timeline,
    adam_direction,
    apply_update,
    fit,
    init_moments,
    measure_hardware,
    predict,
    program_memory,
    summarize,
)


def hardware(task, write):
    """The card, and the figures that the cost model predicts from."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    total = None if limit is None else int(limit / task["fraction"])
    moments = {}
    update = jax.jit(lambda g, m: adam_direction(g, m, AdamOptions()), donate_argnums=1)

    def adam(gradient):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            before = moments.pop(0, None) or init_moments(gradient.shape)
            direction, moments[0] = update(gradient, before)
            return direction

    figures = measure_hardware(
        link_named(task["link"]), adam, nbytes=task["bytes"], elements=task["bytes"] // 4,
        width=task["width"], repeats=10, device_memory=total,
    )  # fmt: skip
    write(
        device=device.device_kind,
        backend=jax.default_backend(),
        jax=jax.__version__,
        cores=os.cpu_count(),
        memory_total=total,
        figures=dataclasses.asdict(figures),
    )


def products(task, write):
    """Seconds of the sparse products on a block's kernels, and of what they take the place of."""
    shape = SHAPES[task["shape"]]
    tokens, size, nnz = task["batch"] * task["length"], task["subspace"], shape.nnz
    for d_in, d_out in sorted(set(shape.kernels)):
        p, q = make_projector(0, d_in, size, nnz), make_projector(1, d_out, size, nnz)
        narrow = cache(make_projector(0, d_in, size, nnz, dtype=jnp.bfloat16))
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (tokens, d_in), jnp.bfloat16)
        dy = jax.random.normal(keys[1], (tokens, d_out), jnp.bfloat16)
        g = jax.random.normal(keys[2], (d_in, d_out), jnp.float32)
        kernel = jnp.zeros((d_in, d_out), jnp.bfloat16)
        delta = jax.random.normal(keys[3], (size, size), jnp.bfloat16)
        built = jax.jit(lambda x, p: x @ to_dense(p).astype(x.dtype))
        full = jax.jit(lambda x, dy: jnp.matmul(x.T, dy, preferred_element_type=jnp.float32))
        write(
            d_in=d_in,
            d_out=d_out,
            subspace=size,
            nnz=nnz,
            tokens=tokens,
            full_gradient=seconds_of(full, x, dy),
            core_gradient=seconds_of(full, x[:, :size], dy[:, :size]),
            project_sparse=seconds_of(jax.jit(project), x, p),
            project_dense=seconds_of(jax.jit(project), x, cache(p)),
            project_dense_bfloat16=seconds_of(jax.jit(project), x, narrow),
            project_built_bfloat16=seconds_of(built, x, p),
            lift_sparse=seconds_of(jax.jit(lift_matrix), delta.astype(jnp.float32), p, q),
            apply=seconds_of_apply(task, kernel, delta, p, q),
            fit_step=seconds_of_fit(g, p, q),
        )


def seconds_of_apply(task, kernel, delta, p, q):
    rounding = task["rounding"]
    if rounding in ("kahan", "master"):
        rounding = "stochastic"  # those carry a second array; the products are the same

    def run(kernel):
        key = jax.random.key(0)
        return apply_update(kernel, delta, p, q, rounding=rounding, key=key)[0]

    program, holder = jax.jit(run, donate_argnums=0), [kernel]

    def step():
        holder[0] = program(holder[0])
        return holder[0]

    return seconds_of(step)


def seconds_of_fit(g, p, q, steps=11):
    """Of one Adam step on the values of a pair."""
    few, many = FitOptions(steps=1, threshold=0.0), FitOptions(steps=steps, threshold=0.0)
    return (seconds_of(fit, g, p, q, many) - seconds_of(fit, g, p, q, few)) / (steps - 1)


def seconds_of(function, *args, repeats=5):
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def programs(task, write):
    """Memory of every compiled program, from shapes alone."""
    shape = SHAPES[task["shape"]]
    model = make_model(shape, task["attention"])
    stack, params = random_stack(model)
    batch = random_batch(shape, task["batch"], task["length"])
    found = program_memory(
        stack, params, head_loss_of(model, task["chunk"]), batch,
        schedule=task["schedule"], options=options_of(task, shape),
    )  # fmt: skip
    for name, memory in found.items():
        write(program=name, added=memory.added, **memory._asdict())


def step(task, write):
    """Steps of one schedule: time, peak memory, bytes over the link, and the prediction."""
    shape = SHAPES[task["shape"]]
    model, timeline = make_model(shape, task["attention"]), Timeline()
    stack, params = random_stack(model)
    batch = random_batch(shape, task["batch"], task["length"])
    workload = workload_of(shape, task["batch"], task["length"])
    began = time.perf_counter()
    say("set-up")
    trainer = PipelinedTrainer(
        stack, params, head_loss_of(model, task["chunk"]), batch,
        schedule=task["schedule"], options=options_of(task, shape),
        calibration=lambda step: batch, link=link_named(task["link"]), timeline=timeline,
    )  # fmt: skip
    ready, peak_ready = time.perf_counter(), peak()
    say("first step: compiles, and fits projectors")
    loss = trainer.step(batch)["loss"]
    trainer.drain()
    first, peak_first = time.perf_counter(), peak()
    say("second step")
    trainer.step(batch)
    trainer.drain()
    timeline.clear()
    say("measured steps")
    start = time.perf_counter()
    count = 0
    # At least three, so that one of them has a step before and after it.
    while count < 3 or (
        count < task["most_steps"] and time.perf_counter() - start < task["most_seconds"]
    ):
        metrics = trainer.step(batch)
        count += 1
    trainer.drain()
    wall = (time.perf_counter() - start) / count
    mean = summarize(timeline).mean
    stats = jax.local_devices()[0].memory_stats() or {}
    write(
        outcome="ok",
        seconds=mean.seconds,
        seconds_with_drain=wall,
        steps=count,
        setup_seconds=ready - began,
        first_step_seconds=first - ready,
        loss=[loss, metrics["loss"]],
        finite=metrics["finite"],
        overlap=mean.overlap,
        busy=dict(mean.busy),
        critical=dict(mean.critical),
        bytes_to_host=mean.bytes_to_host,
        bytes_to_device=mean.bytes_to_device,
        model_bytes=workload.model_bytes,
        one_way=mean.bytes_to_host / workload.model_bytes,
        both_ways=(mean.bytes_to_host + mean.bytes_to_device) / workload.model_bytes,
        work=mean_seconds(timeline),
        peak=peak(),
        peak_after_setup=peak_ready,
        peak_after_first_step=peak_first,
        memory_limit=stats.get("bytes_limit"),
        cap_enforced=task.get("cap") and stats.get("bytes_limit", np.inf) <= 1.001 * task["cap"],
        **predicted(task, shape, workload),
    )


def peak():
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def mean_seconds(timeline):
    """Mean seconds of each kind of work on a block."""
    found = {}
    for span in timeline.spans:
        if span.block >= 0:
            found.setdefault(span.name, []).append(span.seconds)
    return {name: statistics.fmean(values) for name, values in found.items()}


def predicted(task, shape, workload):
    """By the cost model, from the figures of this machine if they were measured."""
    if task.get("figures") is None:
        return {}
    setting = Setting(task["subspace"], shape.nnz, task["wire"], task["product"] == "dense")
    found = predict(Hardware(**task["figures"]), workload, task["schedule"], setting)
    return {
        "predicted_seconds": found.seconds,
        "predicted_bytes": found.device_bytes,
        "predicted_parts": dict(found.device),
    }


def say(stage):
    print(f"stage: {stage}", file=sys.stderr, flush=True)


def outcome_of(error):
    """In a word; a device that is out of memory is a result here."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "ut of memory" in text:
        return "out of memory"
    return "refused" if isinstance(error, EmlocError) else "failed"


PARTS = {
    "hardware": hardware,
    "bandwidth": bandwidth,
    "products": products,
    "programs": programs,
    "step": step,
    "cap": step,
}


def main():
    task = json.loads(sys.argv[1])
    names = {key: value for key, value in task.items() if key not in ("figures", "results")}

    def write(**record):
        with Path(task["results"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(names | {"outcome": "ok"} | record) + "\n")

    try:
        PARTS[task["part"]](task, write)
        write(done=True)
    except Exception as error:
        traceback.print_exc()
        outcome = outcome_of(error)
        message = f"{type(error).__name__}: {error}"[:600]
        # What is out of memory or refused would be so again.
        write(outcome=outcome, message=message, done=outcome != "failed")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # lanes of a trainer that failed may wait for what will not come


if __name__ == "__main__":
    main()
