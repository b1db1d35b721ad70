"""The adapters of a run: made for the options, or loaded, with the head of a classifier."""

import jax

from emloc_jax.adapters import Trainable, Whole, init_adapters, init_whole
from emloc_jax.checkpoints import AdapterHead, adapter_head, head_parameters, load_adapter
from emloc_jax.cli._options import LoraOptions
from emloc_jax.cli._session import Session
from emloc_jax.errors import AdapterMismatchError, ConfigError
from emloc_jax.kernels import select

__all__ = ["adapted_paths", "head_in", "new_adapters", "open_adapter"]


def adapted_paths(session: Session, options: LoraOptions) -> list[str]:
    """Kernels that get an adapter: those selected, but tied heads and what is trained whole.

    Raises:
      UnmatchedRuleError: an expression matches nothing.
      ConfigError: nothing is left.
    """
    kernels = [path for path, spec in session.kernels.items() if not spec.tied]
    chosen = select(options.where, kernels)
    whole = head_parameters(session.base)
    left = [path for path in chosen if path not in whole]
    if not left:
        raise ConfigError(
            f"lora.where={options.where} selects {', '.join(chosen)} alone, of the classification "
            "head, which is trained whole anyway. Select kernels of the layers."
        )
    return left


def new_adapters(session: Session, options: LoraOptions, seed: int) -> dict[str, Trainable]:
    """Untrained adapters on the selected kernels, and a classifier's head as it is.

    Args:
      session: its parameters may be tracers.
      options: of the adapters.
      seed: of the run.
    """
    adapters = init_adapters(
        jax.random.fold_in(jax.random.key(seed), 1),
        {path: session.kernels[path] for path in adapted_paths(session, options)},
        where=".*",
        rank=options.rank,
        alpha=options.alpha,
        rslora=options.rslora,
    )
    head = head_parameters(session.base)
    whole = init_whole(session.base.params, where=head) if head else {}
    return {**adapters, **whole}


def head_in(adapter: str | None) -> AdapterHead | None:
    """The classification head that an adapter's folder carries, if one is given and does."""
    return None if adapter is None else adapter_head(adapter)


def open_adapter(folder: str, session: Session) -> dict[str, Trainable]:
    """An adapter of the session's model.

    Raises:
      AdapterMismatchError: see `load_adapter`; or the model's head was made afresh and the adapter
        does not replace all of it.
    """
    adapters = load_adapter(folder, session.base)
    fresh = [path for path in session.base.fresh if not isinstance(adapters.get(path), Whole)]
    if fresh:
        raise AdapterMismatchError(
            f"{session.base.source} lacks {', '.join(fresh)}, and the adapter in {folder} does not "
            "hold them either. Give the base that it was trained on."
        )
    return adapters
