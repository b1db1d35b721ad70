"""The emulator of a ratio as shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from emloc_jax.adapters import Adapter, init_adapters
from emloc_jax.emulator import candidates, ranks_for_rules
from emloc_jax.kernels import KernelSpec, LowRankKernel, select, set_leaves
from emloc_jax.memory._abstract_model import AbstractModel
from emloc_jax.memory._setting import Setting

__all__ = ["abstract_adapters", "abstract_emulator", "compressed", "selected"]


def compressed(abstract: AbstractModel, setting: Setting) -> dict[str, int]:
    """`{path: rank}` of the kernels that the library's rules compress, by its rank rule.

    Raises:
      UnmatchedRuleError: a rule that matches no kernel.
    """
    chosen, others = candidates(selected(abstract, setting.where))
    _, ranks = ranks_for_rules(setting.ratio, chosen, others)
    return ranks


def abstract_emulator(abstract: AbstractModel, setting: Setting) -> Any:
    """Shapes of the emulator's parameters.

    Example:
      >>> from emloc_jax.memory import abstract_model
      >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 8}
      >>> model = abstract_model({"model_type": "gpt2", **sizes})
      >>> emulator = abstract_emulator(model, Setting(ratio=0.5))
      >>> emulator["layers"]["mlp"]["c_fc"]["kernel"].left.shape
      (2, 16, 6)
    """

    def boxed(params: Any) -> Any:
        return set_leaves(
            params,
            {path: _box(abstract.kernels[path], rank) for path, rank in ranks.items()},
        )

    ranks = compressed(abstract, setting)
    return jax.eval_shape(boxed, abstract.params)


def abstract_adapters(abstract: AbstractModel, setting: Setting) -> dict[str, Adapter]:
    """Shapes of the adapters."""
    kernels = selected(abstract, setting.lora_where)
    return jax.eval_shape(
        lambda key: init_adapters(
            key, kernels, where=".*", rank=setting.lora_rank, alpha=2.0 * setting.lora_rank
        ),
        jax.eval_shape(lambda: jax.random.key(0)),
    )


def selected(abstract: AbstractModel, where: tuple[str, ...]) -> dict[str, KernelSpec]:
    """Kernels that `where` matches; tied embeddings never are."""
    free = [path for path, spec in abstract.kernels.items() if not spec.tied]
    return {path: abstract.kernels[path] for path in select(list(where), free)}


def _box(spec: KernelSpec, rank: int) -> LowRankKernel:
    return LowRankKernel(
        left=jnp.zeros((*spec.stack_shape, *spec.in_shape, rank), spec.dtype),
        right=jnp.zeros((*spec.stack_shape, rank, *spec.out_shape), spec.dtype),
        layout=spec.layout,
    )
