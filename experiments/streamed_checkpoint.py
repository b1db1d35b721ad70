"""A checkpoint larger than the memory that is allowed: emulate, correct, merge and export it.

Makes a random Llama-shaped checkpoint in bf16 shards and runs every streamed stage in a process of
its own, whose memory the operating system bounds: by a control group where one can be made, else by
RLIMIT_DATA, which bounds private writable memory. Prints per stage the time, the peak resident set
(VmHWM, which counts mapped pages of the checkpoint that the kernel may take back at any time) and
the peak of its private part (RssAnon, sampled).

    export PYTHONPATH=.
    python experiments/streamed_checkpoint.py --size 12GB --limit 6GiB --folder streamed
    python experiments/streamed_checkpoint.py --size 1GB --limit 2GiB --hidden 1024 --folder s
"""

import argparse
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from emloc_jax._bytes import format_bytes, parse_bytes

STAGES = ("emulate", "correct", "merge", "export")
SHARD = 500_000_000
VOCABULARY = 4096


def config_of(hidden: int, layers: int) -> dict:
    """A Llama of this width; the MLP is 2.75 times as wide."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(hidden // 512, 1),
        "head_dim": 128,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def tensors_of(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Hugging Face stores them."""
    d, m = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (VOCABULARY, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        own = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": shape for n, shape in own.items()}
        own = {"gate": (m, d), "up": (m, d), "down": (d, m)}
        shapes |= {f"{layer}mlp.{n}_proj.weight": shape for n, shape in own.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (d,)
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (VOCABULARY, d)}


def make_checkpoint(folder: Path, size: int, hidden: int) -> None:
    """Writes it shard by shard."""
    from safetensors.numpy import save_file

    config = config_of(hidden, 1)
    one = sum(2 * int(np.prod(s)) for n, s in tensors_of(config).items() if ".layers." in n)
    config = config_of(hidden, max(2, round(size / one)))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[str]] = [[]]
    filled, shapes = 0, tensors_of(config)
    for name, shape in shapes.items():
        if filled > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * int(np.prod(shape))
    rng, index = np.random.default_rng(0), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in names:
            shape = shapes[name]
            noise = rng.standard_normal(shape, np.float32)
            scaled = 1 + 0.1 * noise if len(shape) == 1 else noise / np.sqrt(shape[1])
            arrays[name] = scaled.astype(ml_dtypes.bfloat16)
        save_file(arrays, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def run_stage(stage: str, folder: Path, options: argparse.Namespace) -> None:
    """One stage, in a process of its own."""
    import jax
    import jax.numpy as jnp

    from emloc_jax.adapters import init_adapters
    from emloc_jax.checkpoints import load_adapter, load_pretrained, save_adapter
    from emloc_jax.cli._main import _calm_blas
    from emloc_jax.kernels import find_kernels
    from emloc_jax.streaming import StreamedCorrection, stream_emulator, stream_merge

    _calm_blas()
    base = load_pretrained(
        folder / "model",
        abstract=True,
        scan_layers=True,
        remat=True,
        compute_dtype=jnp.bfloat16,
        tokenizer=False,
    )
    found = find_kernels(base.model.apply, base.params, jax.ShapeDtypeStruct((1, 8), np.int32))
    kernels = {path: spec for path, spec in found.items() if path.startswith("layers/")}
    if stage == "emulate":
        rng = np.random.default_rng(1)
        shape = (options.rows, options.length)
        tokens = rng.integers(0, VOCABULARY, shape).astype(np.int32)
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, 1),
            "weights": np.ones(shape, np.float32),
            "positions": np.tile(np.arange(options.length, dtype=np.int32), (options.rows, 1)),
            "segments": np.ones(shape, np.int32),
        }
        batches = [batch] if options.weighting != "plain" else []
        stream_emulator(
            folder / "emulator",
            base,
            batches,
            kernels=kernels,
            ratios=options.ratio,
            weighting=options.weighting,
            activations=parse_bytes("256MiB"),
            resume=options.resume,
            on_step=lambda done, total: print(f"  step {done} of {total}", end="\r", flush=True),
        )
        adapters = init_adapters(
            jax.random.key(0), kernels, where="layers/.*(q|v|down)_proj", rank=8, alpha=16
        )
        key = jax.random.key(1)
        adapters = {
            p: a.replace(lora_b=0.01 * jax.random.normal(key, a.lora_b.shape))
            for p, a in adapters.items()
        }
        save_adapter(folder / "adapter", adapters, base=base)
        return
    if stage == "correct":
        adapters = load_adapter(folder / "adapter", base)
        corrected, _ = StreamedCorrection(adapters, base, folder / "emulator").correct(3.0)
        save_adapter(folder / "corrected", corrected, base=base, limit=3.0)
    else:
        adapters = load_adapter(folder / "corrected", base)
        stream_merge(folder / stage, base, adapters if stage == "merge" else None)


def bounded(limit: int) -> tuple[str, object]:
    """How memory is bounded, and what a child process calls to be so."""
    for root, name in (
        ("/sys/fs/cgroup", "memory.max"),
        ("/sys/fs/cgroup/unified", "memory.max"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ):
        group = Path(root, f"emloc-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        if not (group / name).exists():  # no control group, or one without memory
            group.rmdir()
            continue
        (group / name).write_text(str(limit))
        return f"control group {group}", functools.partial(_join, group / "cgroup.procs")
    limits = (limit, limit)
    return "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, limits)


def _join(members: Path) -> None:
    members.write_text(str(os.getpid()))


def measure(stage: str, options: argparse.Namespace, enter: object) -> dict:
    """Runs a stage and samples its memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage]
    start = time.monotonic()
    process = subprocess.Popen(command, preexec_fn=enter)
    peak, private = 0, 0
    while process.poll() is None:
        try:
            status = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            peak = max(peak, 1024 * int(status.get("VmHWM", "0 kB").split()[0]))
            private = max(private, 1024 * int(status.get("RssAnon", "0 kB").split()[0]))
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{stage} failed with status {process.returncode}")
    return {"seconds": time.monotonic() - start, "VmHWM": peak, "RssAnon": private}


def main() -> None:
    """Makes the checkpoint if it is not there, and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="12GB", help="of the checkpoint")
    parser.add_argument("--limit", default="6GiB", help="memory of a stage")
    parser.add_argument("--hidden", type=int, default=2048, help="width, a multiple of 512")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--weighting", default="two_sided")
    parser.add_argument("--rows", type=int, default=4, help="of the calibration")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="of a killed emulate")
    parser.add_argument("--keep", action="store_true", help="do not delete what the stages wrote")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.folder, options)
        return
    if not (options.folder / "model").exists():
        make_checkpoint(options.folder / "model", parse_bytes(options.size), options.hidden)
    size = sum(file.stat().st_size for file in (options.folder / "model").iterdir())
    how, enter = bounded(parse_bytes(options.limit))
    print(f"checkpoint {format_bytes(size)}, limit {options.limit} by {how}")
    results = {}
    for stage in STAGES:
        results[stage] = found = measure(stage, options, enter)
        sizes = ", ".join(f"{k} {format_bytes(found[k])}" for k in ("VmHWM", "RssAnon"))
        print(f"{stage:8} {found['seconds']:8.1f} s  peak {sizes}")
        if stage == "export" and not options.keep:
            for name in ("emulator", "adapter", "corrected", "merge", "export"):
                shutil.rmtree(options.folder / name)
    print(json.dumps({"bytes": size, "limit": options.limit, "by": how, "stages": results}))
    if how.startswith("control group"):
        Path(how.removeprefix("control group ")).rmdir()


if __name__ == "__main__":
    main()
