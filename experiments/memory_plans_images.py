"""Planned peaks for InternVL2.5 and FLUX.1-dev, beside the memory that the paper measured.

    python experiments/memory_plans_images.py --output plans_images                 # device at hand
    JAX_PLATFORMS=cpu python experiments/memory_plans_images.py --target rtx4090 --output plans_4090

No weight is read and nothing is allocated: the library's own programs are compiled on the shapes
of `configs/shapes`, in bfloat16. Expect some minutes on two free cores; a model that is planned is
not planned again if its file is in the output folder. Rows of InternVL have the paper's largest
images (six tiles and a thumbnail, 256 tokens each) and 256 tokens of text; pictures of FLUX.1-dev
are the paper's 512 by 512 with a prompt of 512 tokens. Blocks of language model and image encoder
are compressed; adapters are on the language model, as in the paper, with rank 8 (FLUX: attention
and MLPs of the blocks, rank 4). The paper's batches were of two rows (FLUX: one).
"""

import argparse
import json
import time
from pathlib import Path

from emloc_jax._bytes import format_bytes
from emloc_jax.memory import Planner, Setting, abstract_model, target_named

SHAPES = Path(__file__).parent.parent / "configs" / "shapes"
INTERNVL = Setting(
    length=256,
    tiles=7,
    where=("vision/layers/.*", "layers/.*"),
    stream=False,
)
FLUX = Setting(
    length=512,
    latents=32 * 32,
    where=("(double|single)_layers/.*",),
    lora_where=(".*/(attn|ff|ff_context)/.*",),
    lora_rank=4,
    stream=False,
)
MODELS = {
    "internvl2.5-8b": INTERNVL,
    "internvl2.5-26b": INTERNVL,
    "internvl2.5-38b": INTERNVL,
    "flux.1-dev": FLUX,
}
RATIOS = (0.5, 0.25, 0.1)
# GB that the paper measured: LoRA on the original, and its method.
MEASURED = {
    "internvl2.5-26b": (72.9, 18.6),
    "internvl2.5-38b": (94.8, 20.1),
    "flux.1-dev": (35.1, 22.9),
}


def plans_of(name, setting, target, *, training):
    """The number of parameters, and bytes by name of the stage."""
    planner = Planner(abstract_model(SHAPES / name, name=name), target)
    found = {}

    def note(label, stage):
        found[label] = stage.to_dict()
        print(f"{name}, {label}: {format_bytes(stage.device)}", flush=True)

    for stage in planner.plan(["inference", "lora"], setting).stages:
        note(stage.method, stage)
    for ratio in RATIOS:
        for stage in planner.plan(["emulator"], setting.replace(ratio=ratio)).stages:
            note(f"emulator {ratio:g} alone: train", stage)
    others = [] if training else planner.plan(["emloc"], setting.replace(ratio=0.25)).stages
    for stage in others:
        note(f"emloc 0.25, with the original: {stage.name}", stage)
    return planner.abstract.parameters, found


def table_row(cells):
    return "| " + " | ".join(cells) + " |"


def table(plans):
    lines = [table_row(["stage", *plans]), table_row(["---"] + ["---:"] * len(plans))]
    for label in next(iter(plans.values()))["stages"]:
        cells = []
        for plan in plans.values():
            size = plan["stages"][label]["device"]
            share = size / plan["stages"]["inference"]["device"]
            cells.append(f"{format_bytes(size)} ({share:.2f})")
        lines.append(table_row([label, *cells]))
    for place, label in enumerate(("LoRA", "EMLoC")):
        cells = [
            f"{MEASURED[name][place]} GB ({MEASURED[name][place] * 1e9 / 2**30:.1f} GiB)"
            if name in MEASURED
            else ""
            for name in plans
        ]
        lines.append(table_row([f"measured in the paper: {label}", *cells]))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="here")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--training", action="store_true", help="no other stages of emloc")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    target = target_named(options.target)
    options.output.mkdir(parents=True, exist_ok=True)
    plans = {}
    for name in options.models:
        setting = MODELS[name].replace(batch_size=options.batch_size, chunk=options.chunk)
        asked = {"setting": str(setting), "target": target.name, "training": options.training}
        file = options.output / f"{name}.json"
        if file.exists():
            plans[name] = json.loads(file.read_text())
            if any(plans[name][key] != value for key, value in asked.items()):
                parser.error(f"{file} is of other options; give a new --output.")
            continue
        began = time.perf_counter()
        parameters, stages = plans_of(name, setting, target, training=options.training)
        seconds = time.perf_counter() - began
        plans[name] = {**asked, "parameters": parameters, "seconds": seconds, "stages": stages}
        file.write_text(json.dumps(plans[name], indent=2))
        print(f"{name}: {parameters / 1e9:.2f} billion parameters, {seconds:.0f} s", flush=True)
    text = table(plans)
    (options.output / "table.md").write_text(text + "\n")
    print(f"\ncompiled for {target.name}; in parentheses: x inference\n\n{text}")


if __name__ == "__main__":
    main()
