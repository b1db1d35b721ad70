"""From the options of `emloc plan` to a setting; what its model has no use for is refused."""

from emloc_jax._bytes import parse_bytes
from emloc_jax.cli._plan_options import PlanConfig
from emloc_jax.errors import ConfigError
from emloc_jax.memory import AbstractModel, Setting, methods

__all__ = ["plan_setting", "planned_methods", "require_text"]

_CHUNK = 256
_PATCH = 16  # pixels of a picture, each way, that become a token of FLUX
_OF_TEXT = ("streamed_lora", "lsp")


def plan_setting(config: PlanConfig, abstract: AbstractModel) -> Setting:
    """The setting that the options ask for.

    Raises:
      ConfigError: a size that cannot be, or an option that the model has no use for.
    """
    kind = abstract.kind
    _refuse_unused(config, abstract)
    rules = [kind.layers]
    setting = Setting(
        batch_size=config.batch_size * config.accumulation,
        length=config.length,
        tiles=config.tiles or 0,
        latents=_latents(config),
        ratio=config.ratio,
        where=tuple(rules if config.where is None else config.where),
        lora_where=tuple(rules if config.lora_where is None else config.lora_where),
        lora_rank=config.lora_rank,
        chunk=_CHUNK if config.chunk is None else config.chunk,
        remat=config.remat,
        accumulation=config.accumulation,
        calibration_rows=config.calibration_rows,
        calibration_batch=config.calibration_batch,
        gradients=config.weighting == "two_sided",
        subspace=config.subspace,
        nnz=config.nnz,
        stream=kind.streams if config.stream is None else config.stream,
        block_inputs=config.block_inputs,
        activations=None if config.activations is None else parse_bytes(config.activations),
        choose_limit=config.choose_limit,
        eval_rows=config.eval_rows,
        eval_batch=config.eval_batch,
    )
    kind.check(setting)
    return setting


def planned_methods(config: PlanConfig, abstract: AbstractModel) -> list[str]:
    """Whose stages are planned, inference first.

    Raises:
      ConfigError: a method that models of images do not have.
    """
    if config.method != "all":
        if config.method in _OF_TEXT:
            require_text(config, abstract)
        return list(dict.fromkeys(["inference", config.method]))
    if abstract.kind.streams:
        return list(methods())
    return [*(name for name in methods() if name not in _OF_TEXT), "emulator"]


def require_text(config: PlanConfig, abstract: AbstractModel) -> None:
    """Refuses a method that walks the blocks of a model of text.

    Raises:
      ConfigError: it is a model of images, or images are given.
    """
    if not abstract.kind.streams:
        raise ConfigError(
            f"method={config.method} was asked for, but {config.source} is a "
            f"{type(abstract.model).__name__}; models of images are held whole. Use lora, emloc, "
            "emulator (its training alone) or full."
        )
    _refuse_unused(config, abstract)


def _refuse_unused(config: PlanConfig, abstract: AbstractModel) -> None:
    kind, default = abstract.kind, PlanConfig()
    unused = [] if kind.has_tiles else ["tiles"]
    unused += [] if kind.has_pictures else ["height", "width"]
    unused += [] if kind.has_logits else ["chunk"]
    unused += [] if kind.streams else ["activations", "block_inputs"]
    given = [name for name in unused if getattr(config, name) != getattr(default, name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)} was given, but {config.source} is a "
            f"{type(abstract.model).__name__}, to which it makes no difference. Leave it out."
        )


def _latents(config: PlanConfig) -> int:
    sides = (config.height, config.width)
    if sides == (None, None):
        return 0
    if any(side is None or side < _PATCH or side % _PATCH for side in sides):
        raise ConfigError(
            f"height={config.height} and width={config.width} were given; pictures need both, in "
            f"pixels, as multiples of {_PATCH}."
        )
    height, width = (side // _PATCH for side in sides if side is not None)
    return height * width
