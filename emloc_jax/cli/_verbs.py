"""Single stages as commands; each reads folders and writes a new one."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from emloc_jax._files import check_new, new_directory
from emloc_jax.adapters import attach, correction_report, merge
from emloc_jax.checkpoints import (
    adapter_info,
    load_adapter,
    load_emulator,
    save_adapter,
    save_orbax,
    save_pretrained,
)
from emloc_jax.cli._checks import (
    check_correction,
    check_emulation,
    check_emulator_options,
    check_scores,
)
from emloc_jax.cli._console import console, results, say, status
from emloc_jax.cli._data import calibration_batches, encode, load_rows
from emloc_jax.cli._options import (
    CorrectConfig,
    EmulateConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    MergeConfig,
)
from emloc_jax.cli._report import RunReport, StageRow
from emloc_jax.cli._rows import read_source
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import Session, open_session, parameter_count
from emloc_jax.cli._stages import (
    calibrate_session,
    correct_session,
    emulate,
    input_moments,
    score,
    write_emulator,
)
from emloc_jax.cli._task import task_of
from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.training import Row, prompt_tokens

__all__ = ["run_correct", "run_emulate", "run_eval", "run_export", "run_generate", "run_merge"]


def run_emulate(config: EmulateConfig) -> None:
    """Calibrates and compresses; writes an emulator folder."""
    check_emulator_options(config.emulator)
    check_new(config.output)
    session = open_session(config.model)
    check_emulation(session, config.emulator)
    data = load_rows(session, config.data.train, config.data)
    calibration = calibration_batches(
        data,
        config.data,
        rows=config.emulator.calibration_rows,
        batch_size=config.emulator.calibration_batch,
        seed=config.seed,
    )
    moments = calibrate_session(session, calibration, config.emulator)
    emulator, report = emulate(session, moments, config.emulator)
    write_emulator(
        Path(config.output), session, emulator, report, moments, config.emulator, config.seed
    )
    results.print(report.table())
    say(f"The emulator is in {config.output}.")


def run_correct(config: CorrectConfig) -> None:
    """Corrects an adapter; writes a new adapter folder and leaves the old one as it is."""
    check_correction(config.correct)
    check_new(config.output)
    check_new(f"{Path(config.output)}.correction.json")
    session = open_session(config.model)
    adapters = load_adapter(config.adapter, session.base)
    emulator = jax.device_put(load_emulator(config.emulator, session.base))
    moments, choosing = None, []
    if config.correct.limit == "auto" or config.correct.weighted:
        if config.data.train is None:
            raise ConfigError(
                "correct.limit=auto and correct.weighted=true need rows: give data.train."
            )
        data = load_rows(session, config.data.train, config.data)

        def calibration(rows: int) -> list[Any]:
            size = config.calibration.batch
            return calibration_batches(
                data, config.data, rows=rows, batch_size=size, seed=config.seed
            )

        rows = config.calibration.rows
        choosing = calibration(rows if config.correct.rows is None else config.correct.rows)
        if config.correct.weighted:
            moments = input_moments(session, calibration(rows), list(adapters))
    corrected, limit, losses = correct_session(
        session, adapters, emulator, config.correct, choosing, moments
    )
    save_adapter(config.output, corrected, base=session.base, limit=limit)
    report = correction_report(
        adapters,
        session.base.params,
        emulator,
        limit=limit,
        moments=moments,
        bound=config.correct.bound,
    )
    content = report.to_dict() | {"calibration_loss": {str(k): v for k, v in losses.items()}}
    write_json(Path(f"{Path(config.output)}.correction.json"), content)
    results.print(report.table())
    for candidate, loss in losses.items():
        results.print(f"limit {candidate:g}: calibration loss {loss:.4f}")
    say(f"Corrected with limit {limit:g}; the new adapter is in {config.output}.")


def run_merge(config: MergeConfig) -> None:
    """Adds an adapter into its base; writes a Hugging Face folder."""
    check_new(config.output)
    session = open_session(config.model)
    adapters = load_adapter(config.adapter, session.base)
    with status("Writing"):
        # Attached, not merged: the writer adds them tensor by tensor, without a second model.
        save_pretrained(config.output, attach(session.base.params, adapters), like=session.base)
    say(f"The merged model is in {config.output}.")


def run_export(config: ExportConfig) -> None:
    """Writes a model or an adapter in another format."""
    if config.format == "peft" and config.adapter is None:
        raise ConfigError("format=peft writes an adapter; give it as adapter=FOLDER.")
    check_new(config.output)
    session = open_session(config.model)
    adapters = load_adapter(config.adapter, session.base) if config.adapter else None
    with status("Writing"):
        if config.format == "peft":
            assert adapters is not None
            limit = adapter_info(str(config.adapter)).limit
            save_adapter(config.output, adapters, base=session.base, limit=limit)
        else:
            params = session.base.params
            if config.format == "orbax":
                params = params if adapters is None else merge(params, adapters)
                save_orbax(config.output, params, hf_config=session.base.hf_config)
            else:
                params = session.with_adapters(params, adapters)
                save_pretrained(config.output, params, like=session.base)
    say(f"Written to {config.output}.")


def run_eval(config: EvalConfig) -> None:
    """Loss and scores on the rows of `data.test` (or `data.train` if there is no test)."""
    if config.output is not None:
        check_new(config.output)
    source = config.data.test or config.data.train
    if source is None:
        raise ConfigError("There are no rows to evaluate on: give data.test.")
    rows = read_source(source, config.data, first=config.eval.rows)
    task = task_of(rows, config.data, config.eval)
    check_scores(config.eval, task)
    if task is not None and (config.adapter or config.emulator):
        raise UnsupportedArchitectureError(
            "An adapter or emulator was given with rows that have labels; a classifier is "
            "evaluated as it is saved. Leave it out."
        )
    session = open_session(config.model, task=task)
    data = encode(session, rows, config.data)
    params = _params(session, config.emulator, config.adapter)
    name = " + ".join(
        ["emulator" if config.emulator else "original", *(["adapter"] if config.adapter else [])]
    )
    scores = score(session, params, data, config.eval, config.data, name)
    row = StageRow(name, parameter_count(params), scores.loss, scores.scores)
    report = RunReport("eval", [row], {"rows": len(data.rows)})
    for table in report.tables():
        results.print(table)
    if config.output is not None:
        with new_directory(config.output) as folder:
            _write_report(folder, report, scores.report)


def run_generate(config: GenerateConfig) -> None:
    """Answers prompts, from the command line or line by line from standard input."""
    prompts = list(config.prompt) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("There is no prompt: give prompt='[\"…\"]', or lines on standard input.")
    session = open_session(config.model)
    params = _params(session, config.emulator, config.adapter)
    chat = config.chat and bool(getattr(session.tokenizer, "chat_template", None))
    limit = session.base.config.max_position_embeddings - config.sampling.max_new_tokens
    tokens = [
        prompt_tokens(
            Row(f"prompt {i}", prompt=text, completion=""),
            session.tokenizer,
            max_length=limit,
            chat=chat,
            system=config.system,
        )
        for i, text in enumerate(prompts, start=1)
    ]
    sampling: dict[str, Any] = {"temperature": config.sampling.temperature}
    if config.sampling.temperature > 0:
        sampling |= {"top_k": config.sampling.top_k, "top_p": config.sampling.top_p}
        sampling["key"] = jax.random.key(config.sampling.seed)
    with status("Generating"):
        answers = session.answer(
            params, tokens, max_new_tokens=config.sampling.max_new_tokens, **sampling
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            console.print(f"[dim]{prompt}[/dim]")
        results.print(answer.strip(), markup=False, highlight=False)


def _params(session: Session, emulator: str | None, adapter: str | None) -> Any:
    """The original or an emulator, with an adapter if one is given."""
    params = session.base.params
    if emulator is not None:
        params = jax.device_put(load_emulator(emulator, session.base))
    adapters = None if adapter is None else load_adapter(adapter, session.base)
    return session.with_adapters(params, adapters)


def _write_report(folder: Path, report: RunReport, answers: Any) -> None:
    write_json(folder / "report.json", report.to_dict())
    if answers is not None:
        lines = [json.dumps(dataclasses.asdict(answer)) for answer in answers.answers]
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
