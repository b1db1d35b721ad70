"""The whole job: calibrate, emulate, train, correct, merge, evaluate."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._compiling import loop_options
from emloc_jax._program_memory import analysed
from emloc_jax.adapters import Adapter, attach, correction_report
from emloc_jax.checkpoints import load_emulator, save_adapter, save_pretrained
from emloc_jax.cli._checks import (
    check_correction,
    check_data,
    check_emulation,
    check_emulator_options,
    check_method,
    check_moments,
    check_scores,
    check_training,
    compressed_paths,
    new_adapters,
)
from emloc_jax.cli._console import say, status
from emloc_jax.cli._curves import draw_curves
from emloc_jax.cli._data import (
    Dataset,
    calibration_batches,
    encode,
    evaluation_batches,
    training_batches,
)
from emloc_jax.cli._lsp import lsp_facts, open_trainer, train_lsp
from emloc_jax.cli._options import FinetuneConfig
from emloc_jax.cli._report import RunReport, StageRow
from emloc_jax.cli._rows import RowSource, read_source
from emloc_jax.cli._run import Run, check_run
from emloc_jax.cli._session import Session, byte_size, open_session, parameter_count
from emloc_jax.cli._stages import (
    Trained,
    attach_for_training,
    calibrate_session,
    correct_session,
    emulate,
    evaluation_figures,
    input_moments,
    score,
    train_on,
    write_emulator,
)
from emloc_jax.cli._task import task_of
from emloc_jax.emulator import load_moments, save_moments
from emloc_jax.memory import Ledger
from emloc_jax.offload import PipelinedTrainer

__all__ = ["finetune"]


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    train_rows: RowSource | None = None,
    test_rows: RowSource | None = None,
) -> RunReport:
    """Runs `config.method` into the new folder `config.output`.

    Args:
      config: everything.
      resume: go on with an unfinished run of the same configuration.
      train_rows: rows instead of those of `config.data.train`.
      test_rows: rows instead of those of `config.data.test`.

    Returns:
      The report that `report.json` holds.
    """
    check_run(config, resume=resume)
    data = config.data
    test = data.test if test_rows is None else test_rows
    rows = read_source(data.train if train_rows is None else train_rows, data)
    kept = None if test is None else read_source(test, data, first=config.eval.rows)
    task = task_of(rows, data, config.eval)
    check_method(config.method, task)
    check_scores(config.eval, task)
    if config.method == "emloc":
        check_emulator_options(config.emulator)
        check_correction(config.correct)
        check_moments(config.emulator, config.correct)
    # LSP-Offload puts the parameters on the device itself, block by block.
    on_device = config.method != "lsp"
    session = open_session(
        config.model,
        chunk=config.train.chunk,
        on_device=on_device,
        task=task,
        fresh_head=True,
        seed=config.seed,
    )
    if config.method == "emloc":
        check_emulation(session, config.emulator)
    lora = config.lora if config.method in ("emloc", "lora") else None
    check_training(session, config.train, lora)
    train_data = encode(session, rows, data)
    test_data = None if kept is None else encode(session, kept, data)
    check_data(session, config, train_data, test_data)
    trainer = open_trainer(session, config, train_data) if config.method == "lsp" else None
    run = Run(config, resume=resume)  # nothing is written before all of the above is in order
    job = _Job(config, run, session, train_data, test_data)
    match config.method:
        case "emloc":
            job.emloc()
        case "lora":
            job.lora()
        case "full":
            job.full()
        case "lsp":
            assert trainer is not None
            job.lsp(trainer)
    run.write_json("report.json", job.report.to_dict())
    draw_curves(run.folder)
    return job.report


class _Job:
    """One run: its inputs, and the report that its stages fill."""

    def __init__(
        self,
        config: FinetuneConfig,
        run: Run,
        session: Session,
        train_data: Dataset,
        test_data: Dataset | None,
    ):
        self.config, self.run, self.session = config, run, session
        self.train_data, self.test_data = train_data, test_data
        self.ledger = Ledger(run.folder)
        self.report = RunReport(config.method, ledger=self.ledger)

    def emloc(self) -> None:
        """Emulator, adapters trained on it, correction, merge."""
        config, session, params = self.config, self.session, self.session.base.params
        self.evaluate("zero-shot", params, None)
        calibration = self.calibration(config.emulator.calibration_rows)
        emulator, moments = self.emulator(calibration)
        adapters = self.adapters(emulator)
        self.evaluate("adapter on the emulator", emulator, adapters)
        self.evaluate("adapter on the original, uncorrected", params, adapters)
        self.save_adapter("adapter", adapters)

        began = time.perf_counter()
        choosing = calibration
        if config.correct.rows is not None:
            choosing = self.calibration(config.correct.rows)
        with self.ledger.stage("correction"):
            corrected, limit, losses = correct_session(
                session, adapters, emulator, config.correct, choosing, moments
            )
            jax.block_until_ready(corrected)
        self.report.facts["correction_seconds"] = time.perf_counter() - began
        self.report.facts["correction limit"] = limit
        details = correction_report(
            adapters,
            params,
            emulator,
            limit=limit,
            bound=config.correct.bound,
            moments=moments if config.correct.weighted else None,
        )
        content = details.to_dict() | {"calibration_loss": {str(k): v for k, v in losses.items()}}
        self.run.write_json("correction.json", content)
        self.evaluate("adapter on the original, corrected", params, corrected)
        self.save_adapter("adapter_corrected", corrected, limit=limit)
        self.save_merged(attach(params, corrected))

    def lora(self) -> None:
        """Adapters trained on the original, the baseline that needs more memory."""
        params = self.session.base.params
        self.evaluate("zero-shot", params, None)
        adapters = self.adapters(params)
        self.evaluate("adapter on the original", params, adapters)
        self.save_adapter("adapter", adapters)
        self.save_merged(attach(params, adapters))

    def full(self) -> None:
        """All parameters, in memory."""
        params = self.session.base.params
        self.evaluate("zero-shot", params, None)
        # Masters in fp32: a bf16 weight would swallow most updates. Saved as the base was.
        masters = jax.tree.map(lambda array: array.astype(jnp.float32), params)
        params = self.train(masters, None, None).trainables
        self.evaluate("all parameters tuned", params, None)
        self.save_merged(params)

    def lsp(self, trainer: PipelinedTrainer) -> None:
        """All parameters by LSP-Offload: Adam on the host, compressed gradients."""
        config = self.config
        self.evaluate("zero-shot", trainer.params(), None)
        test = self.test_batches() if config.train.evaluate_every is not None else None
        with self.ledger.stage("training"):
            trained = train_lsp(
                trainer,
                self.training_batches(),
                config.train,
                folder=self.run.folder,
                resume=self.run.resumed,
                config=self.run_config(),
                evaluate=self.test_loss(test) if test else None,
            )
        self.report.facts["step_seconds"] = trained.result.seconds_per_step
        self.report.facts["tokens per second"] = trained.result.tokens_per_second
        self.report.facts |= lsp_facts(trainer)
        self.evaluate("all parameters tuned", trained.params, None)
        self.save_merged(trained.params)

    def run_config(self) -> dict[str, Any]:
        """What must be equal when training is resumed."""
        return {"config": (self.run / "config.yaml").read_text(encoding="utf-8")}

    def training_batches(self) -> Any:
        """The endless stream of training batches."""
        config = self.config
        return training_batches(
            self.train_data, config.data, batch_size=config.train.batch_size, seed=config.seed
        )

    def test_loss(self, batches: list[Any]) -> Callable[[Any], dict[str, float]]:
        """From parameters to their loss on the test rows, and metrics."""
        return lambda params: evaluation_figures(self.session, params, batches)

    def calibration(self, rows: int) -> list[Any]:
        """Batches of training rows; a smaller number of rows is a part of a larger one."""
        return calibration_batches(
            self.train_data,
            self.config.data,
            rows=rows,
            batch_size=self.config.emulator.calibration_batch,
            seed=self.config.seed,
        )

    def emulator(self, calibration: list[Any]) -> tuple[Any, Any]:
        """The emulator, from its folder if that stage was finished, and the moments if at hand."""
        config, session, facts = self.config, self.session, self.report.facts
        finished, kept = self.run.has("emulator"), self.run / "moments.safetensors"
        moments = load_moments(kept) if kept.exists() else None
        if moments is None and (not finished or config.correct.weighted):
            began = time.perf_counter()
            with self.ledger.stage("calibration"):
                moments = calibrate_session(
                    session, calibration, config.emulator, full=config.correct.weighted
                )
                if moments is None and config.correct.weighted:  # plain SVD, weighted correction
                    paths = compressed_paths(session, config.emulator)
                    moments = input_moments(session, calibration, paths)
            facts["calibration_seconds"] = time.perf_counter() - began
            if moments is not None and config.emulator.save_moments:
                save_moments(kept, moments)
        if finished:
            emulator = jax.device_put(load_emulator(self.run / "emulator", session.base))
        else:
            began = time.perf_counter()
            with self.ledger.stage("factorization"):
                emulator, report = emulate(session, moments, config.emulator)
                facts["factorization_seconds"] = time.perf_counter() - began
                folder, seed = self.run / "emulator", config.seed
                write_emulator(folder, session, emulator, report, moments, config.emulator, seed)
        facts["original_bytes"] = byte_size(session.base.params)
        facts["emulator_bytes"] = byte_size(emulator)
        return emulator, moments

    def adapters(self, frozen: Any) -> dict[str, Adapter]:
        """Adapters trained on `frozen`."""
        adapters = new_adapters(self.session, self.config.lora, self.config.seed)
        return self.train(adapters, frozen, attach_for_training(self.config.lora)).trainables

    def train(self, trainables: Any, frozen: Any, combine: Any) -> Trained:
        """Trains with checkpoints in the run's folder."""
        config, session = self.config, self.session
        batches = self.training_batches()
        test = self.test_batches() if config.train.evaluate_every is not None else None
        of_params = self.test_loss(test or [])

        def test_loss(trainables: Any) -> dict[str, float]:
            return of_params(trainables if combine is None else combine(trainables, frozen, None))

        with self.ledger.stage("training") as stage:
            trained = train_on(
                session,
                trainables,
                frozen,
                combine,
                batches,
                config.train,
                seed=config.seed,
                folder=self.run.folder,
                resume=self.run.resumed,
                config=self.run_config(),
                evaluate=test_loss if test else None,
            )
            stage.predicted = trained.memory
        facts = self.report.facts
        facts["training step_bytes"] = trained.memory
        batch = next(iter(batches))
        facts["inference of the original_bytes"] = analysed(
            jax.jit(session.infer, compiler_options=loop_options()).lower(
                session.base.params, batch
            )
        ).peak
        facts["step_seconds"] = trained.result.seconds_per_step
        facts["tokens per second"] = trained.result.tokens_per_second
        return trained

    def test_batches(self) -> list[Any]:
        """One pass over the test rows; none without a test set."""
        if self.test_data is None:
            return []
        size = self.config.eval.batch_size
        return evaluation_batches(self.test_data, self.config.data, batch_size=size)

    def evaluate(self, name: str, params: Any, adapters: dict[str, Adapter] | None) -> None:
        """Scores a model on the test rows and keeps its answers."""
        full = self.session.with_adapters(params, adapters)
        row = StageRow(name, parameter_count(full))
        if self.test_data is not None:
            config = self.config
            with self.ledger.stage("evaluation"):
                scores = score(self.session, full, self.test_data, config.eval, config.data, name)
            row = StageRow(name, row.parameters, scores.loss, scores.scores)
            if scores.report is not None:
                file = f"answers/{name.replace(',', '').replace(' ', '_')}.json"
                self.run.write_json(file, [_answer(a) for a in scores.report.answers])
        self.report.stages.append(row)

    def save_adapter(self, name: str, adapters: dict[str, Adapter], **extra: Any) -> None:
        """Writes a PEFT folder, unless a resumed run did so before."""
        if not self.run.has(name):
            base, dropout = self.session.base, self.config.lora.dropout
            with self.ledger.stage("export"):
                save_adapter(self.run / name, adapters, base=base, dropout=dropout, **extra)

    def save_merged(self, params: Any) -> None:
        """Writes the merged model as a Hugging Face folder."""
        if not self.run.has("merged"):
            with status("Writing the merged model"), self.ledger.stage("merge"):
                save_pretrained(self.run / "merged", params, like=self.session.base)
        say(f"The merged model is in {self.run / 'merged'}.")


def _answer(answer: Any) -> dict[str, Any]:
    return {
        "row": answer.origin,
        "reference": answer.reference,
        "answer": answer.prediction,
        "scores": answer.scores,
    }
