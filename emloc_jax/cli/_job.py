"""One run of `finetune`: its inputs, and what all methods share."""

from collections.abc import Callable
from typing import Any

import jax

from emloc_jax._compiling import loop_options
from emloc_jax._program_memory import analysed
from emloc_jax.adapters import Trainable
from emloc_jax.checkpoints import save_adapter, save_pretrained
from emloc_jax.cli._console import say, status
from emloc_jax.cli._data import Dataset, calibration_batches, evaluation_batches, training_batches
from emloc_jax.cli._options import FinetuneConfig
from emloc_jax.cli._original import open_original
from emloc_jax.cli._report import RunReport, StageRow
from emloc_jax.cli._run import Run
from emloc_jax.cli._session import Session, parameter_count
from emloc_jax.cli._stages import evaluation_figures, score
from emloc_jax.cli._training import StepMaker, Trained, train_on
from emloc_jax.memory import Ledger

__all__ = ["Job"]


class Job:
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

    def run_config(self) -> dict[str, Any]:
        """What must be equal when training is resumed."""
        return {"config": (self.run / "config.yaml").read_text(encoding="utf-8")}

    def training_batches(self) -> Any:
        """The endless stream of training batches."""
        config = self.config
        return training_batches(
            self.train_data, config.data, batch_size=config.train.batch_size, seed=config.seed
        )

    def test_batches(self) -> list[Any]:
        """One pass over the test rows; none without a test set."""
        if self.test_data is None:
            return []
        size = self.config.eval.batch_size
        return evaluation_batches(self.test_data, self.config.data, batch_size=size)

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

    def evaluate(
        self, name: str, adapters: dict[str, Trainable] | None = None, params: Any = None
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

    def save_adapter(self, name: str, adapters: dict[str, Trainable], **extra: Any) -> None:
        """Writes a PEFT folder, unless a resumed run did so before."""
        if not self.run.has(name):
            base, dropout = self.session.base, self.config.lora.dropout
            with self.ledger.stage("export"):
                save_adapter(self.run / name, adapters, base=base, dropout=dropout, **extra)

    def save_merged(self, adapters: dict[str, Trainable]) -> None:
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
