"""The commands that write a model in another form."""

from pathlib import Path
from typing import Any

from emloc_jax._files import check_new
from emloc_jax.adapters import merge
from emloc_jax.checkpoints import (
    adapter_info,
    save_adapter,
    save_orbax,
)
from emloc_jax.cli._adapters import head_in, open_adapter
from emloc_jax.cli._budget import check_budget, keep_budget, merge_setting
from emloc_jax.cli._console import say, status
from emloc_jax.cli._options import ExportConfig, MergeConfig
from emloc_jax.cli._original import open_original
from emloc_jax.cli._session import Session, load_parameters, open_session
from emloc_jax.cli._stream import wants_stream
from emloc_jax.errors import ConfigError

__all__ = ["run_export", "run_merge"]


def run_merge(config: MergeConfig, *, resume: bool = False) -> None:
    """Adds an adapter into its base; writes a Hugging Face folder.

    Args:
      config: all options.
      resume: go on with a streamed merge that was killed.
    """
    if not resume:
        check_new(config.output)
    streamed = wants_stream(config.stream, config.model)
    if resume and not streamed:
        raise ConfigError(
            "--resume goes on with a model that is written a tensor at a time. Give stream=true, "
            "or leave --resume out."
        )
    head = head_in(config.adapter)
    session = open_session(config.model, abstract=True, head=head, runs=False)
    check_budget(session, config.memory_budget)
    adapters = open_adapter(config.adapter, session)
    keep_budget(session, config.memory_budget, *merge_setting(adapters, stream=streamed))
    if not streamed:
        session = load_parameters(session, config.model)
    open_original(session).write_merged(Path(config.output), adapters, resume=resume)
    say(f"The merged model is in {config.output}.")


def run_export(config: ExportConfig) -> None:
    """Writes a model or an adapter in another format."""
    if config.format == "peft" and config.adapter is None:
        raise ConfigError("format=peft writes an adapter; give it as adapter=FOLDER.")
    check_new(config.output)
    # An adapter is written without the base's weights.
    streamed = config.format == "peft" or wants_stream(config.stream, config.model)
    if streamed and config.format == "orbax":
        raise ConfigError(
            "Orbax parameters are written from a model that is whole in memory. Give stream=false "
            "on a machine that holds it, or export with format=huggingface."
        )
    head = head_in(config.adapter)
    session = open_session(config.model, abstract=streamed, head=head, runs=False)
    adapters = open_adapter(config.adapter, session) if config.adapter else None
    if config.format == "huggingface":
        open_original(session).write_merged(Path(config.output), adapters)
    else:
        with status("Writing"):
            _write(config, session, adapters)
    say(f"Written to {config.output}.")


def _write(config: ExportConfig, session: Session, adapters: Any) -> None:
    params = session.base.params
    match config.format:
        case "peft":
            limit = adapter_info(str(config.adapter)).limit
            save_adapter(config.output, adapters, base=session.base, limit=limit)
        case "orbax":
            params = params if adapters is None else merge(params, adapters)
            save_orbax(config.output, params, hf_config=session.base.hf_config)
