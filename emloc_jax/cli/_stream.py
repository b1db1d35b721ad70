"""Whether a stage reads its model a block at a time, and what it then runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from emloc_jax._bytes import format_bytes
from emloc_jax.checkpoints import CheckpointBlocks, EmulatorBlocks, load_adapter, load_pretrained
from emloc_jax.cli._console import say, tick
from emloc_jax.cli._data import Dataset, evaluation_batches, prompt_reader
from emloc_jax.cli._options import DataOptions, FinetuneConfig, ModelOptions, ScoreOptions
from emloc_jax.cli._session import Session, byte_size, packaged
from emloc_jax.cli._stages import Scores
from emloc_jax.errors import ConfigError
from emloc_jax.models import BlockSource, EncoderConfig, InternVLConfig, VisionConfig
from emloc_jax.offload import free_host_memory
from emloc_jax.streaming import AdaptedBlocks, stream_generate, stream_loss
from emloc_jax.training import Row, evaluate_generation

__all__ = ["StreamedRun", "finetune_streams", "open_streamed", "wants_stream"]

# A model that takes more of what is free leaves too little for activations, sums and factors.
SHARE = 0.4


def wants_stream(text: str, options: ModelOptions) -> bool:
    """Whether to read the model a block at a time.

    `auto` does so where its parameters take more than 40 % of the memory that is free on the
    device, or on the host where the device computes in it or does not say.

    Args:
      text: `auto`, `true` or `false`.
      options: which model.

    Raises:
      ConfigError: another text, or true for an encoder or a model of images.
    """
    asked = str(text).lower()
    if asked not in ("true", "false", "auto"):
        raise ConfigError(f"stream={text} was asked for; it is auto, true or false.")
    if asked == "false":
        return False
    found = load_pretrained(
        packaged(options.source), dtype=options.dtype, abstract=True, tokenizer=False
    )
    if isinstance(found.config, EncoderConfig | VisionConfig | InternVLConfig):
        if asked == "true":
            raise ConfigError(
                f"stream=true was asked for, but {options.source} is a {found.config.model_type} "
                "model; only language models of text are read a block at a time. Leave it out."
            )
        return False
    if asked == "true":
        return True
    size, free = byte_size(found.params), _free_memory()
    if size > SHARE * free:
        say(
            f"The parameters take {format_bytes(size)} and {format_bytes(free)} are free: "
            "the model is read a block at a time (stream=auto)."
        )
        return True
    return False


def finetune_streams(config: FinetuneConfig) -> bool:
    """Whether a run reads the original a block at a time.

    Raises:
      ConfigError: its method cannot, or moments are to be kept, or see `wants_stream`.
    """
    if config.method in ("emloc", "lora"):
        streamed = wants_stream(config.stream, config.model)
        if streamed and config.method == "emloc" and config.emulator.save_moments:
            raise ConfigError(
                "emulator.save_moments=true was asked for, but a run that reads the original a "
                "block at a time keeps a block's moments only until its kernels are factored. Give "
                "stream=false, or leave it out."
            )
        return streamed
    if str(config.stream).lower() == "true":
        raise ConfigError(
            f"stream=true was asked for with method={config.method}, which trains all parameters; "
            "it is for emloc and lora. method=lsp keeps moments and gradients off the device."
        )
    return False


def _free_memory() -> int:
    host = free_host_memory()
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in statistics:
        return host
    return min(host, statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))


@dataclasses.dataclass(frozen=True)
class StreamedRun:
    """A model that is run a block at a time, as `Session` runs one that is in memory.

    Attributes:
      session: of the original, its parameters abstract.
      source: of the parameters that are run.
    """

    session: Session
    source: BlockSource

    def answer(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Texts that continue tokenized prompts; see `Session.answer`."""
        session = self.session
        new = stream_generate(
            session.base.model, self.source, prompts, eos_ids=session.stop_tokens, **options
        )
        return [session.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def score(
        self, data: Dataset, options: ScoreOptions, data_options: DataOptions, name: str
    ) -> Scores:
        """Loss and scores of answers; see `_stages.score`."""
        session = self.session
        batches = evaluation_batches(data, data_options, batch_size=options.batch_size)
        with tick(f"Loss of {name}", self.source.num_blocks) as move:
            loss = stream_loss(session.base.model, self.source, batches, on_block=move).loss
        if not options.of_answers():
            return Scores(loss, {}, None)
        answer: Callable[[list[Any]], list[str]] = lambda prompts: self.answer(  # noqa: E731
            prompts, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
        )
        with tick(f"Answers of {name}", len(data.rows)) as move:
            report = evaluate_generation(
                answer,
                [row for row in data.rows if isinstance(row, Row)],
                scores=options.of_answers(),
                prompt=prompt_reader(session, data_options, options.max_new_tokens),
                batch_size=options.batch_size,
                on_batch=move,
            )
        return Scores(loss, report.scores, report)


def open_streamed(session: Session, emulator: str | None, adapter: str | None) -> StreamedRun:
    """The original or an emulator, with an adapter if one is given."""
    source: BlockSource
    if emulator is None:
        source = CheckpointBlocks(session.base)
    else:
        source = EmulatorBlocks(emulator, session.base)
    if adapter is not None:
        source = AdaptedBlocks(source, load_adapter(adapter, session.base))
    return StreamedRun(session, source)
