"""A loaded model with what every stage needs of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emloc_jax.adapters import Adapter, attach
from emloc_jax.checkpoints import Pretrained, load_pretrained, smollm2_path
from emloc_jax.cli._console import status
from emloc_jax.cli._options import ModelOptions
from emloc_jax.errors import ConfigError, UnsupportedArchitectureError
from emloc_jax.kernels import KernelSpec, find_kernels, intercept
from emloc_jax.models import EncoderConfig, generate
from emloc_jax.training import Loss, make_loss

__all__ = ["Session", "byte_size", "open_session", "parameter_count"]


@dataclasses.dataclass(frozen=True)
class Session:
    """The original model, and one intercepted `apply` so that every stage shares compilations.

    Attributes:
      base: the original model.
      apply: intercepted `base.model.apply`.
      loss: `loss(params, batch) -> (sum, weight)`.
      kernels: what `find_kernels` found.
    """

    base: Pretrained
    apply: Callable[..., Any]
    loss: Loss
    kernels: dict[str, KernelSpec]

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
        """Texts that continue tokenized prompts."""
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

    def with_adapters(self, params: Any, adapters: dict[str, Adapter] | None) -> Any:
        """`params`, with `adapters` attached if there are any."""
        return params if adapters is None else attach(params, adapters)


def open_session(options: ModelOptions, *, chunk: int = 256, on_device: bool = True) -> Session:
    """Loads the original model, onto the device unless told otherwise."""
    source = str(smollm2_path()) if options.source == "smollm2" else options.source
    load = functools.partial(
        load_pretrained,
        source,
        dtype=options.dtype,
        compute_dtype=jnp.dtype(options.compute_dtype),
        scan_layers=options.scan_layers,
        remat=options.remat,
    )
    with status(f"Loading {options.source}"):
        config = load(abstract=True, tokenizer=False).config
        if isinstance(config, EncoderConfig):
            raise UnsupportedArchitectureError(
                f"{options.source} is a {config.model_type} encoder; this command trains and runs "
                "causal language models. Use one, or the functions from Python."
            )
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            base = load()
        if on_device:  # once; every stage then shares these buffers
            device = jax.local_devices()[0]
            base = dataclasses.replace(base, params=jax.device_put(base.params, device))
    apply = intercept(base.model.apply)
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
    kernels = find_kernels(base.model.apply, base.params, tokens)
    return Session(base, apply, make_loss(apply, chunk=chunk), kernels)


def parameter_count(tree: Any) -> int:
    """Number of parameters in the arrays of a tree; a boxed kernel counts with its factors."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def byte_size(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
