"""`emloc finetune`: the run, then its closing tables."""

from emloc_jax.cli._console import results, say
from emloc_jax.cli._finetune import finetune
from emloc_jax.cli._options import FinetuneConfig

__all__ = ["run_finetune"]


def run_finetune(config: FinetuneConfig, *, resume: bool = False) -> None:
    """Fine-tunes and prints what came out."""
    report = finetune(config, resume=resume)
    for table in report.tables():
        results.print(table)
    say(f"Everything is in {config.output}.")
