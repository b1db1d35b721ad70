"""A loaded model with what every stage needs of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import Trainable, attach
from emloc_jax.checkpoints import (
    AdapterHead,
    Pretrained,
    load_pretrained,
    minilm_path,
    smollm2_path,
)
from emloc_jax.cli._console import status
from emloc_jax.cli._options import ModelOptions
from emloc_jax.cli._task import Task, fit_task, named_head, with_labels_of
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import KernelSpec, find_kernels, intercept
from emloc_jax.models import VisionConfig, generate
from emloc_jax.training import Loss, label_inputs, make_label_logits, make_label_loss, make_loss

__all__ = ["Session", "byte_size", "load_parameters", "open_session", "packaged", "parameter_count"]

_PACKAGED = {"smollm2": smollm2_path, "minilm": minilm_path}


@dataclasses.dataclass(frozen=True)
class Session:
    """The original model, and one intercepted `apply` so that every stage shares compilations.

    Attributes:
      base: the original model.
      apply: intercepted `base.model.apply`.
      loss: `loss(params, batch) -> (sum, weight)`.
      kernels: what `find_kernels` found.
      task: what a classifier tells apart; None for a language model.
      logits: `logits(params, batch) -> (B, outputs)` of a classifier.
    """

    base: Pretrained
    apply: Callable[..., Any]
    loss: Loss
    kernels: dict[str, KernelSpec]
    task: Task | None = None
    logits: Callable[..., Any] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
          ConfigError: the model came without one.
        """
        if self.base.tokenizer is None:
            raise ConfigError(
                f"{self.base.source} holds no tokenizer, so text can be neither read nor written. "
                "Put the tokenizer's files into the folder."
            )
        return self.base.tokenizer

    @property
    def stop_tokens(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the model's."""
        ids = self.base.hf_config.get("eos_token_id")
        found = set(ids if isinstance(ids, list) else [ids]) | {self.tokenizer.eos_token_id}
        return sorted(int(i) for i in found if i is not None)

    def answer(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Texts that continue tokenized prompts; an `ImagePrompt` brings its tiles."""
        readers = [getattr(prompt, "read_pixels", None) for prompt in prompts]
        if any(readers):
            sampling["pixels"] = [read() for read in readers if read is not None]
        new = generate(
            self.base.model,
            params,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_ids=self.stop_tokens,
            batch_size=batch_size,
            apply=self.apply,
            **sampling,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def infer(self, params: Any, batch: Mapping[str, Any]) -> jax.Array:
        """What running the model computes: logits of a row, or of the next token of each row."""
        if self.logits is not None:
            return self.logits(params, batch)
        images = {"pixels": batch["pixels"]} if "pixels" in batch else {}
        hidden = self.apply({"params": params}, batch["tokens"], method="hidden", **images)
        return self.apply({"params": params}, hidden[:, -1], method="logits")

    def inputs(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the model takes of a batch, by position."""
        if self.task is not None:
            return label_inputs(batch)
        pixels = (batch["pixels"],) if "pixels" in batch else ()
        return batch["tokens"], batch["positions"], batch["segments"], *pixels

    def with_adapters(self, params: Any, adapters: Mapping[str, Trainable] | None) -> Any:
        """`params`, with `adapters` attached if there are any."""
        return params if adapters is None else attach(params, adapters)


def open_session(
    options: ModelOptions,
    *,
    chunk: int = 256,
    abstract: bool = False,
    task: Task | None = None,
    fresh_head: bool = False,
    head: AdapterHead | None = None,
    seed: int = 0,
    runs: bool = True,
) -> Session:
    """Loads the original model onto the device, or only its shapes.

    Args:
      options: which model, and how it computes.
      chunk: tokens whose logits live at once.
      abstract: give shapes and dtypes in place of parameters: for stages that read a block at a
        time, or until `load_parameters`.
      task: what a classifier is to tell apart; None: a language model is wanted.
      fresh_head: make a classification head where there is none.
      head: of the adapter that the model is opened for; the model gets one like it.
      seed: of a fresh head.
      runs: the model will be run; if not, an encoder needs no task.

    Raises:
      EmlocError: see `fit_task` and `load_pretrained`.
    """
    load = _loader(options)
    with status(f"Opening {options.source}"):
        if head is not None:
            load = functools.partial(load, num_labels=head.outputs)
        found = with_labels_of(head, load(abstract=True, tokenizer=False))
        if runs or task is not None:
            task = fit_task(task, found, fresh_head=fresh_head)
        if task is not None:
            load = functools.partial(load, num_labels=task.outputs, seed=seed)
        base = with_labels_of(head, load(abstract=True))
    apply = intercept(base.model.apply)
    kernels = find_kernels(base.model.apply, base.params, **_shapes_of_inputs(base.config))
    if task is None:
        session = Session(base, apply, make_loss(apply, chunk=chunk), kernels)
    else:
        logits = make_label_logits(apply)
        loss = make_label_loss(logits)
        session = Session(named_head(base, task), apply, loss, kernels, task, logits)
    return session if abstract else load_parameters(session, options, seed=seed)


def _shapes_of_inputs(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """One small batch, in shapes, that every kernel sees."""
    vision = config if isinstance(config, VisionConfig) else getattr(config, "vision", None)
    shapes = {}
    if vision is not config:
        shapes["tokens"] = jax.ShapeDtypeStruct((1, 8), np.int32)
    if vision is not None:
        lead = (1,) if vision is config else (1, 1)
        shape = (*lead, *vision.image_size, vision.num_channels)
        shapes["pixels"] = jax.ShapeDtypeStruct(shape, np.float32)
    return shapes


def load_parameters(
    session: Session, options: ModelOptions, *, on_device: bool = True, seed: int = 0
) -> Session:
    """A session that was opened abstract, with its parameters.

    Args:
      session: of the same options.
      options: see `open_session`.
      on_device: put the parameters there.
      seed: see `open_session`.

    Raises:
      EmlocError: see `load_pretrained`.
    """
    load, labels = _loader(options), getattr(session.base.config, "num_labels", None)
    if labels is not None:
        load = functools.partial(load, num_labels=labels, seed=seed)
    with status(f"Loading {options.source}"):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            params = load(tokenizer=False).params
        if on_device:  # once; every stage then shares these buffers
            params = jax.device_put(params, jax.local_devices()[0])
    return dataclasses.replace(session, base=dataclasses.replace(session.base, params=params))


def _loader(options: ModelOptions) -> Callable[..., Pretrained]:
    return functools.partial(
        load_pretrained,
        packaged(options.source),
        dtype=options.dtype,
        compute_dtype=jnp.dtype(options.compute_dtype),
        scan_layers=options.scan_layers,
        remat=options.remat,
    )


def packaged(source: str) -> str:
    """Where a model lies that a Python package carries; any other source as it is.

    Raises:
      CheckpointError: the package is not installed.
    """
    return str(_PACKAGED[source]()) if source in _PACKAGED else source


def parameter_count(tree: Any) -> int:
    """Number of parameters in the arrays of a tree; a boxed kernel counts with its factors."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def byte_size(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
