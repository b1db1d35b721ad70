"""`emloc demo`: the whole story on a real model and a small task, in minutes."""

from pathlib import Path

from emloc_jax.cli._console import results, say
from emloc_jax.cli._finetune import finetune
from emloc_jax.cli._options import (
    CorrectionOptions,
    DataOptions,
    EmulatorOptions,
    FinetuneConfig,
    ModelOptions,
    ScoreOptions,
    TrainOptions,
)
from emloc_jax.cli._orders import order_rows
from emloc_jax.cli._report import RunReport

__all__ = ["demo", "demo_config"]

TRAIN_ROWS, TEST_ROWS = 1024, 96


def demo_config(output: str, *, seed: int = 0) -> FinetuneConfig:
    """The demo's settings: SmolLM2-135M, orders to JSON, an emulator at ratio 0.5."""
    return FinetuneConfig(
        output=output,
        seed=seed,
        model=ModelOptions(source="smollm2"),
        data=DataOptions(train="generated orders", test="generated orders", max_length=128),
        emulator=EmulatorOptions(ratio=0.5, calibration_rows=128, calibration_batch=16),
        train=TrainOptions(
            steps=32, batch_size=8, learning_rate=1e-3, warmup=4, save_every=16, chunk=64
        ),
        correct=CorrectionOptions(rows=32),
        eval=ScoreOptions(scores=["exact_match"], max_new_tokens=40, batch_size=32),
    )


def demo(output: str, *, seed: int = 0, resume: bool = False) -> RunReport:
    """Runs the demo and prints its table."""
    config = demo_config(output, seed=seed)
    example = order_rows("test", 1, seed=seed)[0]
    say(
        "SmolLM2-135M-Instruct learns to turn an order into JSON. It is compressed into an "
        "emulator, the emulator is\nfine-tuned with LoRA, and the corrected LoRA goes back into "
        f"the original.\n\n[dim]{example['prompt']}[/dim]{example['completion']}\n"
    )
    report = finetune(
        config,
        resume=resume,
        train_rows=order_rows("train", TRAIN_ROWS, seed=seed),
        test_rows=order_rows("test", TEST_ROWS, seed=seed),
    )
    for table in report.tables():
        results.print(table)
    folder = Path(output)
    say(
        f"Everything is in {folder}: merged/ (Hugging Face), adapter_corrected/ (PEFT), emulator/, "
        "report.json, curves.png. Try:\n"
        f"  emloc generate model.source={folder / 'merged'} chat=false "
        f"'prompt=[\"{example['prompt'].splitlines()[0]}\\nJSON:\"]'"
    )
    return report
