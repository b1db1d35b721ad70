"""The whole job: calibrate, emulate, train, correct, merge, evaluate."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax._compiling import loop_options
from emloc_jax._program_memory import analysed
from emloc_jax.adapters import Adapter
from emloc_jax.checkpoints import load_emulator, save_adapter, save_pretrained
from emloc_jax.cli._budget import finetune_setting, keep_budget
from emloc_jax.cli._checks import (
    check_correction,
    check_data,
    check_emulation,
    check_emulator_options,
    check_method,
    check_model,
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
from emloc_jax.cli._original import open_original
from emloc_jax.cli._polish import ContinuedBatches, check_polish, polish_training
from emloc_jax.cli._report import RunReport, StageRow
from emloc_jax.cli._rows import RowSource, read_source
from emloc_jax.cli._run import Run, check_run
from emloc_jax.cli._saved_base import with_saved_base
from emloc_jax.cli._session import (
    Session,
    byte_size,
    load_parameters,
    open_session,
    parameter_count,
)
from emloc_jax.cli._stages import (
    calibrate_session,
    emulate,
    evaluation_figures,
    input_moments,
    score,
    stream_emulate,
    write_emulator,
)
from emloc_jax.cli._stream import finetune_streams
from emloc_jax.cli._task import task_of
from emloc_jax.cli._training import (
    StepMaker,
    Trained,
    attach_for_training,
    step_in_memory,
    train_on,
)
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
    check_polish(config.polish, config.method)
    streamed = finetune_streams(config)
    session = open_session(
        config.model,
        chunk=config.train.chunk,
        abstract=True,
        task=task,
        fresh_head=True,
        seed=config.seed,
    )
    check_model(session, config.method)
    if config.method == "emloc":
        check_emulation(session, config.emulator)
    lora = config.lora if config.method in ("emloc", "lora") else None
    check_training(session, config.train, lora)
    train_data = encode(session, rows, data)
    test_data = None if kept is None else encode(session, kept, data)
    check_data(session, config, train_data, test_data)
    if config.memory_budget is not None:
        planned = finetune_setting(config, session, train_data, test_data, stream=streamed)
        keep_budget(session, config.memory_budget, *planned)
    if not streamed:
        # LSP-Offload puts the parameters on the device itself, block by block.
        on_device = config.method != "lsp"
        session = load_parameters(session, config.model, on_device=on_device, seed=config.seed)
    trainer = open_trainer(session, config, train_data) if config.method == "lsp" else None
    run = Run(config, resume=resume)  # nothing is written before all of the above is in order
    if session.base.fresh and config.method in ("emloc", "lora"):
        session = with_saved_base(run, session)
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
        self.original = open_original(
            session, chunk=config.train.chunk, activations=config.activations
        )
        self.ledger = Ledger(run.folder)
        self.report = RunReport(config.method, ledger=self.ledger)

    def emloc(self) -> None:
        """Emulator, adapters trained on it, correction, perhaps a polish, merge."""
        config = self.config
        self.evaluate("zero-shot")
        calibration = self.calibration(config.emulator.calibration_rows)
        emulator, moments = self.emulator(calibration)
        adapters = self.adapters(emulator)
        self.evaluate("adapter on the emulator", adapters, emulator)
        self.evaluate("adapter on the original, uncorrected", adapters)
        self.save_adapter("adapter", adapters)
        corrected = self.corrected(adapters, emulator, calibration, moments)
        del emulator, moments  # the polish needs their memory
        if config.polish.steps:
            corrected = self.polished(corrected)
        self.save_merged(corrected)

    def corrected(
        self, adapters: dict[str, Adapter], emulator: Any, calibration: list[Any], moments: Any
    ) -> dict[str, Adapter]:
        """The adapters corrected for the original."""
        options, choosing = self.config.correct, calibration
        if options.rows is not None:
            choosing = self.calibration(options.rows)
        began = time.perf_counter()
        with self.ledger.stage("correction"):
            done = self.original.correct(
                adapters,
                emulator,
                self.run / "emulator",
                options,
                choosing,
                calibration if options.weighted else None,
                moments,
            )
            jax.block_until_ready(done.adapters)
        self.report.facts["correction_seconds"] = time.perf_counter() - began
        self.report.facts["correction limit"] = done.limit
        losses = {str(k): v for k, v in done.losses.items()}
        content = done.report.to_dict() | {"calibration_loss": losses}
        self.run.write_json("correction.json", content)
        self.evaluate("adapter on the original, corrected", done.adapters)
        self.save_adapter("adapter_corrected", done.adapters, limit=done.limit)
        return done.adapters

    def polished(self, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
        """Corrected adapters after some steps on the original, on the batches that follow."""
        config, options = self.config, polish_training(self.config.polish, self.config.train)
        with self.ledger.stage("polish") as stage:
            trained = train_on(
                self.original.lora_step(options, config.lora),
                adapters,
                ContinuedBatches(self.training_batches(), config.train.steps),
                options,
                seed=config.seed,
                folder=self.run / "polish",
                resume=self.run.resumed,
                config=self.run_config(),
                draws=3,
                title="Polishing",
            )
            stage.predicted = trained.memory
        self.report.facts["polish step_bytes"] = trained.memory
        self.report.facts["polish step_seconds"] = trained.result.seconds_per_step
        self.evaluate("adapter on the original, polished", trained.trainables)
        self.save_adapter("adapter_polished", trained.trainables)
        return trained.trainables

    def lora(self) -> None:
        """Adapters trained on the original, the baseline that needs more memory."""
        config = self.config
        self.evaluate("zero-shot")
        adapters = new_adapters(self.session, config.lora, config.seed)
        step = self.original.lora_step(config.train, config.lora)
        adapters = self.train(step, adapters, self.original.test_figures).trainables
        self.evaluate("adapter on the original", adapters)
        self.save_adapter("adapter", adapters)
        self.save_merged(adapters)

    def full(self) -> None:
        """All parameters, in memory."""
        params = self.session.base.params
        self.evaluate("zero-shot")
        # Masters in fp32: a bf16 weight would swallow most updates. Saved as the base was.
        masters = jax.tree.map(lambda array: array.astype(jnp.float32), params)
        step = step_in_memory(self.session, None, None, self.config.train)
        params = self.train(step, masters, self.test_figures).trainables
        self.evaluate("all parameters tuned", None, params)
        self.save_tuned(params)

    def lsp(self, trainer: PipelinedTrainer) -> None:
        """All parameters by LSP-Offload: Adam on the host, compressed gradients."""
        config = self.config
        self.evaluate("zero-shot", None, trainer.params())
        test = self.test_batches() if config.train.evaluate_every is not None else None
        with self.ledger.stage("training"):
            trained = train_lsp(
                trainer,
                self.training_batches(),
                config.train,
                folder=self.run.folder,
                resume=self.run.resumed,
                config=self.run_config(),
                evaluate=(lambda params: self.test_figures(params, test)) if test else None,
            )
        self.report.facts["step_seconds"] = trained.result.seconds_per_step
        self.report.facts["tokens per second"] = trained.result.tokens_per_second
        self.report.facts |= lsp_facts(trainer)
        self.evaluate("all parameters tuned", None, trained.params)
        self.save_tuned(trained.params)

    def run_config(self) -> dict[str, Any]:
        """What must be equal when training is resumed."""
        return {"config": (self.run / "config.yaml").read_text(encoding="utf-8")}

    def training_batches(self) -> Any:
        """The endless stream of training batches."""
        config = self.config
        return training_batches(
            self.train_data, config.data, batch_size=config.train.batch_size, seed=config.seed
        )

    def test_figures(self, params: Any, batches: list[Any]) -> dict[str, float]:
        """What an evaluation of parameters in memory during training records."""
        return evaluation_figures(self.session, params, batches)

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
        if self.original.streamed:
            return self.streamed_emulator(calibration), None
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
        self.sizes(emulator)
        # What only the factorization needed must not lie there while adapters train.
        return emulator, moments if config.correct.weighted else None

    def streamed_emulator(self, calibration: list[Any]) -> Any:
        """The emulator, made a block at a time unless its folder was finished before."""
        config, session = self.config, self.session
        folder = self.run / "emulator"
        if not self.run.has("emulator"):
            began = time.perf_counter()
            with self.ledger.stage("calibration and factorization"):
                stream_emulate(
                    folder,
                    session,
                    calibration,
                    config.emulator,
                    seed=config.seed,
                    activations=config.activations,
                    resume=self.run.resumed,
                )
            self.report.facts["calibration and factorization_seconds"] = time.perf_counter() - began
        emulator = jax.device_put(load_emulator(folder, session.base))
        self.sizes(emulator)
        return emulator

    def sizes(self, emulator: Any) -> None:
        """Notes the sizes of the original and of an emulator."""
        self.report.facts["original_bytes"] = byte_size(self.session.base.params)
        self.report.facts["emulator_bytes"] = byte_size(emulator)

    def adapters(self, emulator: Any) -> dict[str, Adapter]:
        """Adapters trained on the emulator."""
        config, combine = self.config, attach_for_training(self.config.lora)
        adapters = new_adapters(self.session, config.lora, config.seed)
        step = step_in_memory(self.session, emulator, combine, config.train)

        def figures(adapters: Any, batches: list[Any]) -> dict[str, float]:
            return self.test_figures(combine(adapters, emulator, None), batches)

        return self.train(step, adapters, figures).trainables

    def train(
        self,
        make_step: StepMaker,
        trainables: Any,
        figures: Callable[[Any, list[Any]], dict[str, float]],
    ) -> Trained:
        """Trains with checkpoints in the run's folder; `figures` evaluate trainables on batches."""
        config, session = self.config, self.session
        batches = self.training_batches()
        test = self.test_batches() if config.train.evaluate_every is not None else None
        with self.ledger.stage("training") as stage:
            trained = train_on(
                make_step,
                trainables,
                batches,
                config.train,
                seed=config.seed,
                folder=self.run.folder,
                resume=self.run.resumed,
                config=self.run_config(),
                evaluate=(lambda trainables: figures(trainables, test)) if test else None,
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

    def evaluate(
        self, name: str, adapters: dict[str, Adapter] | None = None, params: Any = None
    ) -> None:
        """Scores a model on the test rows and keeps its answers; without `params` the original."""
        config, session = self.config, self.session
        shown = session.base.params if params is None else params
        row = StageRow(name, parameter_count(session.with_adapters(shown, adapters)))
        if self.test_data is not None:
            given = self.test_data, config.eval, config.data, name
            with self.ledger.stage("evaluation"):
                if params is None:
                    scores = self.original.score(adapters, *given)
                else:
                    scores = score(session, session.with_adapters(params, adapters), *given)
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

    def save_merged(self, adapters: dict[str, Adapter]) -> None:
        """Writes the original with adapters added in as a Hugging Face folder."""
        if not self.run.has("merged"):
            with self.ledger.stage("merge"):
                self.original.write_merged(self.run / "merged", adapters, resume=self.run.resumed)
        say(f"The merged model is in {self.run / 'merged'}.")

    def save_tuned(self, params: Any) -> None:
        """Writes parameters as a Hugging Face folder."""
        if not self.run.has("merged"):
            with status("Writing the model"), self.ledger.stage("merge"):
                save_pretrained(self.run / "merged", params, like=self.session.base)
        say(f"The tuned model is in {self.run / 'merged'}.")


def _answer(answer: Any) -> dict[str, Any]:
    return {
        "row": answer.origin,
        "reference": answer.reference,
        "answer": answer.prediction,
        "scores": answer.scores,
    }
