"""The commands that run a model: evaluation and generation."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from emloc_jax._files import check_new, new_directory
from emloc_jax.checkpoints import load_emulator
from emloc_jax.cli._adapters import head_in, open_adapter
from emloc_jax.cli._checks import check_scores
from emloc_jax.cli._console import console, results, status
from emloc_jax.cli._data import encode
from emloc_jax.cli._image_data import image_prompt, image_tokens
from emloc_jax.cli._options import EvalConfig, GenerateConfig
from emloc_jax.cli._report import RunReport, StageRow
from emloc_jax.cli._rows import read_source
from emloc_jax.cli._run import write_json
from emloc_jax.cli._session import Session, open_session, parameter_count
from emloc_jax.cli._stages import score
from emloc_jax.cli._stream import open_streamed, wants_stream
from emloc_jax.cli._task import task_of
from emloc_jax.errors import ConfigError
from emloc_jax.models import InternVLConfig
from emloc_jax.training import Row, prompt_tokens

__all__ = ["run_eval", "run_generate"]


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
    streamed = task is None and wants_stream(config.stream, config.model)
    head = head_in(config.adapter) if task is not None else None
    session = open_session(config.model, task=task, head=head, abstract=streamed)
    data = encode(session, rows, config.data)
    name = " + ".join(
        ["emulator" if config.emulator else "original", *(["adapter"] if config.adapter else [])]
    )
    if streamed:
        run = open_streamed(session, config.emulator, config.adapter)
        scores = run.score(data, config.eval, config.data, name)
        size = _abstract_count(session, config.emulator, config.adapter)
    else:
        params = _params(session, config.emulator, config.adapter)
        scores = score(session, params, data, config.eval, config.data, name)
        size = parameter_count(params)
    row = StageRow(name, size, scores.loss, scores.scores)
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
    streamed = wants_stream(config.stream, config.model)
    session = open_session(config.model, abstract=streamed)
    chat = config.chat and bool(getattr(session.tokenizer, "chat_template", None))
    limit = session.base.config.max_position_embeddings - config.sampling.max_new_tokens
    images, read = tuple(config.image), prompt_tokens
    rows = [
        Row(f"prompt {i}", prompt=text, completion="", images=images)
        for i, text in enumerate(prompts, start=1)
    ]
    if isinstance(session.base.config, InternVLConfig):
        words = image_tokens(session, config.max_tiles)
        rows = [words.place(row) for row in rows]
        read = functools.partial(image_prompt, words=words)
    elif images:
        raise ConfigError(
            f"image={list(images)} was given, but {session.base.source} is a "
            f"{session.base.config.model_type}, which reads text alone. Give an InternVL."
        )
    how = {"max_length": limit, "chat": chat, "system": config.system}
    tokens = [read(row, tokenizer=session.tokenizer, **how) for row in rows]
    sampling: dict[str, Any] = {"temperature": config.sampling.temperature}
    if config.sampling.temperature > 0:
        sampling |= {"top_k": config.sampling.top_k, "top_p": config.sampling.top_p}
        sampling["key"] = jax.random.key(config.sampling.seed)
    sampling["max_new_tokens"] = config.sampling.max_new_tokens
    with status("Generating"):
        if streamed:
            run = open_streamed(session, config.emulator, config.adapter)
            answers = run.answer(tokens, **sampling)
        else:
            params = _params(session, config.emulator, config.adapter)
            answers = session.answer(params, tokens, **sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            console.print(f"[dim]{prompt}[/dim]")
        results.print(answer.strip(), markup=False, highlight=False)


def _params(session: Session, emulator: str | None, adapter: str | None) -> Any:
    """The original or an emulator, with an adapter if one is given."""
    params = session.base.params
    if emulator is not None:
        params = jax.device_put(load_emulator(emulator, session.base))
    adapters = None if adapter is None else open_adapter(adapter, session)
    return session.with_adapters(params, adapters)


def _abstract_count(session: Session, emulator: str | None, adapter: str | None) -> int:
    """Parameters of what is run, from headers."""
    params = session.base.params
    if emulator is not None:
        params = load_emulator(emulator, session.base, abstract=True)
    adapters = None if adapter is None else open_adapter(adapter, session)
    return parameter_count(session.with_adapters(params, adapters))


def _write_report(folder: Path, report: RunReport, answers: Any) -> None:
    write_json(folder / "report.json", report.to_dict())
    if answers is not None:
        lines = [json.dumps(dataclasses.asdict(answer)) for answer in answers.answers]
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
