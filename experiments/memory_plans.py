"""Planned peaks of every stage of every method, for models from 135 million to 38 billion.

    python experiments/memory_plans.py --output memory_plans                    # device at hand
    JAX_PLATFORMS=cpu python experiments/memory_plans.py --target rtx4090 --output plans_4090

No weight is read and nothing is allocated: the library's real programs are compiled on shapes, in
bfloat16, for the device at hand or for a card that is not here (that needs JAX's CUDA plugin: pip
install jax-cuda12-plugin jax-cuda12-pjrt --no-deps, in JAX's version). Expect about ten minutes on
two free cores for the CPU, twice that for a card. Weights of the large models are never needed:
`configs/shapes` holds their sizes. `38b` is Qwen2.5-32B's widths with 75 layers in place of 64, so
that it has 38 billion parameters; the paper's InternVL2.5-38B is Qwen2.5-32B with a vision tower
of 6 billion: `memory_plans_images.py`.
"""

import argparse
import json
import time
from pathlib import Path

from emloc_jax._bytes import format_bytes
from emloc_jax.memory import Planner, Setting, abstract_model, target_named

SHAPES = Path(__file__).parent.parent / "configs" / "shapes"
MODELS = ("smollm2-135m", "llama-3.1-8b", "qwen2.5-32b", "38b")
RATIOS = (0.5, 0.25, 0.1)


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def plans_of(name, setting, target):
    """Figures by name of the stage; training on the emulator once per ratio."""
    planner = Planner(abstract_model(SHAPES / name, name=name), target)
    plan = planner.plan(["inference", "lora", "streamed_lora", "lsp"], setting)
    found = {s.method: s for s in plan.stages if s.name in ("inference", "train")}
    for ratio in RATIOS:
        for stage in planner.plan(["emloc"], setting.replace(ratio=ratio)).stages:
            if stage.name == "train":
                found[f"emloc {ratio:g}: {stage.name}"] = stage
            else:  # nearly the same at every ratio
                found.setdefault(f"emloc: {stage.name}", stage)
    return planner.abstract.parameters, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="here")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    target = target_named(options.target)
    setting = Setting(
        batch_size=options.batch_size,
        length=options.length,
        chunk=options.chunk,
        calibration_batch=options.batch_size,
    )
    options.output.mkdir(parents=True)
    columns, facts = {}, {}
    for name in options.models:
        began = time.perf_counter()
        parameters, found = plans_of(name, setting, target)
        seconds = time.perf_counter() - began
        columns[name] = found
        facts[name] = {"parameters": parameters, "seconds": seconds}
        content = {"setting": str(setting), "target": target.name, **facts[name]}
        content["stages"] = {key: stage.to_dict() for key, stage in found.items()}
        (options.output / f"{name}.json").write_text(json.dumps(content, indent=2))
        print(f"{name}: {parameters / 1e9:.2f} billion parameters, {seconds:.0f} s", flush=True)
    lines = [table_row(["stage", *columns]), table_row(["---"] + ["---:"] * len(columns))]
    for key in next(iter(columns.values())):
        cells = []
        for found in columns.values():
            share = found[key].device / found["inference"].device
            cells.append(f"{format_bytes(found[key].device)} ({share:.2f})")
        lines.append(table_row([key, *cells]))
    text = "\n".join(lines)
    (options.output / "table.md").write_text(text + "\n")
    print(f"\n{setting}, compiled for {target.name}; in parentheses: x inference\n\n{text}")


if __name__ == "__main__":
    main()
