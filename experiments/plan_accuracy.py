"""What plans say against what runs take, on this machine's CPU.

Every case runs in a process of its own: once to compile everything, then again, from the loading of
its parameters, with the peak of the resident set (VmHWM) started anew. Measured is that peak less
what was resident before; on a CPU it holds what the plan counts on the device and on the host. With
`--cap` a third run is put, after compiling, into a control group whose limit is the plan's figure
and 5 % of it: what was resident before is charged elsewhere.

    export PYTHONPATH=.
    python experiments/plan_accuracy.py --folder accuracy         # about 15 minutes, 3 GB of disk
    python experiments/plan_accuracy.py --folder accuracy --cap   # needs root and control groups
    python experiments/plan_accuracy.py --folder accuracy --cases lora emulate
    python experiments/plan_accuracy.py --folder accuracy --composition

`--composition` compares figures only: the LoRA step of a whole model as one program, against what
the programs of its blocks, those of the streamed step, add up to with all blocks on the device.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from streamed_checkpoint import VOCABULARY, config_of, make_checkpoint

from emloc_jax._bytes import format_bytes, parse_bytes
from emloc_jax.memory import Planner, Setting, abstract_model

GROUPS = Path("/sys/fs/cgroup/memory")
SIZES = {"shallow": ("66MB", 1024), "small": ("220MB", 1024), "deep": ("440MB", 1024)}
ROWS = 4
SETTING = dict(
    batch_size=1, length=128, ratio=0.5, lora_rank=8, chunk=128, calibration_rows=ROWS,
    calibration_batch=1,
)  # fmt: skip
# Name: (size of the checkpoint, dtype of parameters and computation, method, setting, stages).
CASES = {
    "inference": ("deep", "float32", "inference", {}, ("inference",)),
    "inference bf16": ("deep", "bfloat16", "inference", {}, ("inference",)),
    "lora": ("deep", "float32", "lora", {}, ("train",)),
    "lora bf16": ("deep", "bfloat16", "lora", {}, ("train",)),
    "emulator": ("deep", "float32", "emloc", {}, ("train",)),
    "full": ("small", "bfloat16", "full", {}, ("train",)),
    "streamed lora": ("deep", "float32", "streamed_lora", {}, ("train",)),
    "emulate": ("small", "float32", "emloc", {}, ("calibrate", "factorize")),
    "emulate one-sided": (
        "small", "float32", "emloc", {"gradients": False}, ("calibrate", "factorize"),
    ),
    "correct": ("small", "float32", "emloc", {}, ("choose limit", "correct")),
    "merge": ("small", "float32", "emloc", {}, ("merge",)),
    "emulate in memory": (
        "shallow", "float32", "emloc", {"stream": False}, ("calibrate", "factorize"),
    ),
}  # fmt: skip


def source_of(name, folder):
    return folder / CASES[name][0]


def setting_of(name):
    return Setting(**{**SETTING, **CASES[name][3]})


def predict(name, folder):
    """The plan's largest stage."""
    _, dtype, method, _, stages = CASES[name]
    abstract = abstract_model(source_of(name, folder), dtype=dtype, compute_dtype=dtype)
    plan = Planner(abstract).plan([method], setting_of(name))
    chosen = [stage for stage in plan.stages if stage.name in stages]
    return max(chosen, key=lambda stage: stage.together)


def batch_of(setting, rows=None):
    shape = (setting.batch_size if rows is None else rows, setting.length)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, shape).astype(np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "weights": np.ones(shape, np.float32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "segments": np.ones(shape, np.int32),
    }


class Case:
    """One case on real arrays; `run` starts with nothing of it in memory."""

    def __init__(self, name, folder, home):
        import jax
        import jax.numpy as jnp

        from emloc_jax.checkpoints import load_pretrained
        from emloc_jax.kernels import find_kernels

        self.name, self.home = name, home
        _, self.dtype, self.method, _, self.stages = CASES[name]
        self.setting = setting_of(name)
        self.base = load_pretrained(
            source_of(name, folder),
            abstract=True,
            dtype=self.dtype,
            compute_dtype=jnp.dtype(self.dtype),
            scan_layers=True,
            remat=True,
            tokenizer=False,
        )
        tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
        found = find_kernels(self.base.model.apply, self.base.params, tokens)
        self.kernels = {path: spec for path, spec in found.items() if path.startswith("layers/")}
        self.made = {}
        self._keep_programs()

    def once(self, make):
        """Programs made in the first run serve the second, which then compiles nothing."""
        if not self.made:
            self.made["programs"] = make()
        return self.made["programs"]

    def _keep_programs(self):
        """The same for programs that the stages of room streaming make for themselves."""
        from emloc_jax.streaming import _correct, _emulate, _loss, _passes

        made = _emulate.streamed_model(self.base.model, chunk=self.setting.chunk)
        for room in (_correct, _emulate, _loss):
            room.streamed_model = lambda *_, **__: made
        for name in ("tapped_backward", "tapped_forward", "_plain_backward"):
            plain = getattr(_passes, name)
            kept = {}
            setattr(
                _passes,
                name,
                lambda block, taps, plain=plain, kept=kept: kept.setdefault(
                    tuple(taps.specs), plain(block, taps)
                ),
            )

    def filled(self, shapes, dtype=None):
        """Arrays of some shapes, made on the device one after the other."""
        import jax
        import jax.numpy as jnp

        return jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, 0.01, dtype or leaf.dtype).block_until_ready(), shapes
        )

    def adapters(self):
        import jax

        from emloc_jax.adapters import init_adapters

        made = init_adapters(jax.random.key(0), self.kernels, where=".*", rank=8, alpha=16.0)
        return {p: a.replace(lora_b=a.lora_b + 0.001) for p, a in made.items()}

    def batches(self):
        return [batch_of(self.setting, 1) for _ in range(self.setting.calibration_rows)]

    def run(self):
        getattr(self, self.name.split()[0] if " " not in self.name else {
            "inference bf16": "inference", "lora bf16": "lora", "streamed lora": "streamed_lora",
            "emulate one-sided": "emulate", "emulate in memory": "emulate_in_memory",
        }[self.name])()  # fmt: skip

    def inference(self):
        import jax

        from emloc_jax._compiling import loop_options
        from emloc_jax.kernels import intercept

        apply = intercept(self.base.model.apply)

        def infer(params, batch):
            hidden = apply({"params": params}, batch["tokens"], method="hidden")
            return apply({"params": params}, hidden[:, -1], method="logits")

        params = self.filled(self.base.params)
        batch = {"tokens": batch_of(self.setting)["tokens"]}
        run = self.once(lambda: jax.jit(infer, compiler_options=loop_options()))
        run(params, batch).block_until_ready()

    def _train(self, trainables, frozen, combine):
        import jax

        from emloc_jax.kernels import intercept
        from emloc_jax.training import (
            init_state,
            make_loss,
            make_optimizer,
            make_schedule,
            make_train_step,
        )

        schedule = make_schedule(1e-3, steps=100, warmup=5)
        tx = make_optimizer(schedule)
        loss = make_loss(intercept(self.base.model.apply), chunk=self.setting.chunk)
        extra = {} if combine is None else {"combine": combine}
        step = self.once(lambda: make_train_step(loss, tx, schedule=schedule, **extra))
        state = init_state(trainables, tx)  # the caller keeps what it gave, as `finetune` does
        batch = batch_of(self.setting)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready((state, metrics))

    def lora(self):
        from emloc_jax.adapters import attach

        params = self.filled(self.base.params)
        self._train(self.adapters(), params, lambda a, frozen, key: attach(frozen, a))

    def emulator(self):
        from emloc_jax.adapters import attach
        from emloc_jax.memory import AbstractModel, abstract_emulator

        own = AbstractModel("case", self.base.model, self.base.params, self.kernels)
        params = self.filled(abstract_emulator(own, self.setting))
        self._train(self.adapters(), params, lambda a, frozen, key: attach(frozen, a))

    def full(self):
        import jax.numpy as jnp

        params = self.filled(self.base.params)
        masters = self.filled(self.base.params, jnp.float32)
        self._train(masters, None, None)
        del params

    def streamed_lora(self):
        import jax

        from emloc_jax.checkpoints import CheckpointBlocks
        from emloc_jax.kernels import intercept
        from emloc_jax.models import block_stack
        from emloc_jax.streaming import StreamedLoraStep
        from emloc_jax.training import init_state, make_head_loss, make_optimizer, make_schedule

        schedule = make_schedule(1e-3, steps=100, warmup=5)
        tx = make_optimizer(schedule)
        model = self.base.model
        step = StreamedLoraStep(
            block_stack(model, wrap=intercept),
            make_head_loss(intercept(model.apply), chunk=self.setting.chunk),
            tx,
            schedule=schedule,
        )
        step.programs, step.update = self.once(lambda: (step.programs, step.update))
        adapters, source = self.adapters(), CheckpointBlocks(self.base)
        state = init_state(adapters, tx)
        for _ in range(2):
            state, metrics = step(state, source, batch_of(self.setting))
            jax.block_until_ready((state, metrics))
        del adapters

    def emulate(self, output=None):
        from emloc_jax.streaming import stream_emulator

        output = self.home / "emulator" if output is None else output
        shutil.rmtree(output, ignore_errors=True)
        stream_emulator(
            output,
            self.base,
            self.batches(),
            kernels=self.kernels,
            ratios=self.setting.ratio,
            weighting="two_sided" if self.setting.gradients else "one_sided",
            chunk=self.setting.chunk,
        )

    def correct(self):
        from emloc_jax.streaming import StreamedCorrection

        emulator = self.home / "kept"
        if not emulator.exists():
            self.emulate(emulator)
        work = StreamedCorrection(self.adapters(), self.base, emulator)
        work.choose_limit(self.batches(), chunk=self.setting.chunk)
        work.correct(1.0)

    def merge(self):
        from emloc_jax.streaming import stream_merge

        shutil.rmtree(self.home / "merged", ignore_errors=True)
        stream_merge(self.home / "merged", self.base, self.adapters())

    def emulate_in_memory(self):
        import jax

        from emloc_jax.emulator import calibrate, compress
        from emloc_jax.kernels import intercept
        from emloc_jax.training import make_loss

        loss = make_loss(intercept(self.base.model.apply), chunk=self.setting.chunk)
        key = jax.random.key(0)
        params = jax.tree.map(
            lambda leaf: (
                0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
            ).block_until_ready(),
            self.base.params,
        )
        moments = calibrate(
            lambda variables, batch: loss(variables["params"], batch)[0],
            params,
            self.batches(),
            kernels=self.kernels,
            mask=lambda batch: batch["segments"] > 0,
            gradients=True,
        )
        emulator, _ = compress(params, moments, kernels=self.kernels, ratios=self.setting.ratio)
        jax.block_until_ready(emulator)


def composition():
    """Prints whole programs against the sums of their blocks' programs."""
    print("| layers | dtype | whole | blocks | blocks / whole | growth per block, ratio |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for dtype in ("float32", "bfloat16"):
        before = None
        for layers in (2, 4, 8, 16):
            config = config_of(1024, layers)
            planner = Planner(abstract_model(config, dtype=dtype, compute_dtype=dtype))
            lora, streamed = (
                planner.plan([m], Setting(**SETTING)).of(m)[0] for m in ("lora", "streamed_lora")
            )
            # The scan of a whole program slices the block that it works on, hence one more.
            others = layers + 1 - 2
            outer = streamed.parts["outer parameters"]
            block = (lora.parts["parameters"] - outer) // layers
            assert streamed.parts["blocks"] == 2 * block
            blocks = streamed.device + others * block
            growth = ""
            if before is not None:
                growth = f"{(blocks - before[1]) / (lora.device - before[0]):.3f}"
            before = lora.device, blocks
            cells = [str(layers), dtype, format_bytes(lora.device), format_bytes(blocks)]
            print("| " + " | ".join([*cells, f"{blocks / lora.device:.3f}", growth]) + " |")


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field}")


def child(options):
    """Compiles, measures, and prints a JSON line."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(options.folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    home = options.folder / "work" / options.case.replace(" ", "-")
    home.mkdir(parents=True, exist_ok=True)
    case = Case(options.case, options.folder, home)
    case.run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    if options.limit:
        group = GROUPS / f"emloc-{os.getpid()}"
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(options.limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    Path("/proc/self/clear_refs").write_text("5")
    case.run()
    print(json.dumps({"before": before, "measured": resident("VmHWM") - before}))


def launch(name, options, limit=0):
    command = [sys.executable, __file__, "--folder", options.folder, "--case", name]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        [*command, "--limit", str(limit)], stdout=subprocess.PIPE, env=environment, text=True
    )
    output, _ = process.communicate()
    group = GROUPS / f"emloc-{process.pid}"
    if group.exists():
        with contextlib.suppress(OSError):
            group.rmdir()
    if process.returncode:
        return None
    return json.loads(output.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--cap", action="store_true", help="also run under a cap")
    parser.add_argument("--composition", action="store_true", help="compare figures, run nothing")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(options)
        return
    if options.composition:
        composition()
        return
    for name, (size, hidden) in SIZES.items():
        if not (options.folder / name).exists():
            make_checkpoint(options.folder / name, parse_bytes(size), hidden)
    print("| case | planned | measured | measured / planned | under a cap of 1.05 x planned |")
    print("| --- | ---: | ---: | ---: | --- |", flush=True)
    rows = {}
    for name in options.cases:
        stage = predict(name, options.folder)
        planned = stage.together
        found = launch(name, options)
        measured = found["measured"] if found else 0
        capped = ""
        if options.cap:
            capped = "runs" if launch(name, options, round(1.05 * planned)) else "killed"
        cells = [format_bytes(planned), format_bytes(measured), f"{measured / planned:.3f}", capped]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
        rows[name] = {"planned": planned, "measured": measured, "cap": capped}
        rows[name] |= {"stage": stage.to_dict()}
    (options.folder / "accuracy.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
