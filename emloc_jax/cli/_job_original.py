"""`finetune` with methods that train the original: LoRA, all parameters, LSP-Offload."""

import jax
import jax.numpy as jnp

from emloc_jax.cli._adapters import new_adapters
from emloc_jax.cli._job import Job
from emloc_jax.cli._lsp import lsp_facts, train_lsp
from emloc_jax.cli._training import step_in_memory
from emloc_jax.offload import PipelinedTrainer

__all__ = ["run_full", "run_lora", "run_lsp"]


def run_lora(job: Job) -> None:
    """Adapters trained on the original, the baseline that needs more memory."""
    config = job.config
    job.evaluate("zero-shot")
    adapters = new_adapters(job.session, config.lora, config.seed)
    step = job.original.lora_step(config.train, config.lora)
    adapters = job.train(step, adapters, job.original.test_figures).trainables
    job.evaluate("adapter on the original", adapters)
    job.save_adapter("adapter", adapters)
    job.save_merged(adapters)


def run_full(job: Job) -> None:
    """All parameters, in memory."""
    params = job.session.base.params
    job.evaluate("zero-shot")
    # Masters in fp32: a bf16 weight would swallow most updates. Saved as the base was.
    masters = jax.tree.map(lambda array: jnp.array(array, jnp.float32), params)
    step = step_in_memory(job.session, None, None, job.config.train)
    params = job.train(step, masters, job.test_figures).trainables
    job.evaluate("all parameters tuned", None, params)
    job.save_tuned(params)


def run_lsp(job: Job, trainer: PipelinedTrainer) -> None:
    """All parameters by LSP-Offload: Adam on the host, compressed gradients."""
    config = job.config
    job.evaluate("zero-shot", None, trainer.params())
    test = job.test_batches() if config.train.evaluate_every is not None else None
    with job.ledger.stage("training"):
        trained = train_lsp(
            trainer,
            job.training_batches(),
            config.train,
            folder=job.run.folder,
            resume=job.run.resumed,
            config=job.run_config(),
            evaluate=(lambda params: job.test_figures(params, test)) if test else None,
        )
    job.report.facts["step_seconds"] = trained.result.seconds_per_step
    job.report.facts["tokens per second"] = trained.result.tokens_per_second
    job.report.facts |= lsp_facts(trainer)
    job.evaluate("all parameters tuned", None, trained.params)
    job.save_tuned(trained.params)
