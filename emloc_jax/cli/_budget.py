"""`memory_budget`: a run that would take more of the device is refused before it starts."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from emloc_jax._bytes import parse_bytes
from emloc_jax.adapters import Adapter, split_whole
from emloc_jax.cli._checks import compressed_paths
from emloc_jax.cli._console import say, status
from emloc_jax.cli._data import Dataset, evaluation_batches
from emloc_jax.cli._options import (
    CorrectConfig,
    DataOptions,
    EmulateConfig,
    EmulatorOptions,
    FinetuneConfig,
)
from emloc_jax.cli._session import Session
from emloc_jax.errors import ConfigError
from emloc_jax.kernels import flatten_leaves, select
from emloc_jax.memory import AbstractModel, Budget, Plan, Planner, Setting, require_fits
from emloc_jax.models import CausalModel, InternVLConfig

__all__ = [
    "batch_shape",
    "check_budget",
    "correct_setting",
    "emulate_setting",
    "finetune_setting",
    "keep_budget",
    "merge_setting",
    "tiles_of",
]


def keep_budget(
    session: Session, budget: str | None, methods: Sequence[str], setting: Setting
) -> Plan | None:
    """Plans a run on the shapes of its model, for the device at hand.

    Args:
      session: its parameters may be abstract.
      budget: bytes of the device's memory, as text; None: no limit, and nothing is planned.
      methods: whose stages will run, see `emloc_jax.memory.methods`.
      setting: of the run.

    Raises:
      ConfigError: a malformed budget.
      PlanError: a stage takes more; the message has the nearest setting that fits.
    """
    if budget is None:
        return None
    limit = Budget(device=parse_bytes(budget))
    base = session.base
    assert isinstance(base.model, CausalModel)  # see `check_budget`
    model = AbstractModel(str(base.source), base.model, _shapes(base.params), session.kernels)
    planner = Planner(model)
    with status("Planning: compiling the stages on shapes"):
        plan = require_fits(planner, methods, setting, limit)
    largest = plan.obstacle
    say(
        f"Planned: the largest stage is '{largest.name}' with {largest.device / 2**30:.2f} GiB of "
        f"the {limit} allowed."
    )
    return plan


def check_budget(session: Session, budget: str | None) -> None:
    """Refuses a budget for a model that cannot be planned.

    Raises:
      ConfigError: an encoder by itself.
    """
    base = session.base
    if budget is not None and not isinstance(base.model, CausalModel):
        raise ConfigError(
            f"memory_budget={budget} was given, but plans of runs are for language models, with "
            f"images or without, and {base.source} is a {type(base.model).__name__}. Leave it out."
        )


def finetune_setting(
    config: FinetuneConfig, session: Session, train: Dataset, test: Dataset | None, *, stream: bool
) -> tuple[list[str], Setting]:
    """The methods to plan and the setting of a run."""
    options, lora = config.train, config.lora
    method = "streamed_lora" if config.method == "lora" and stream else config.method
    setting = Setting(
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        **_rows([data for data in (train, test) if data is not None], config.data, session),
        lora_where=tuple(lora.where),
        lora_rank=lora.rank,
        chunk=options.chunk,
        remat=config.model.remat,
        stream=stream,
        block_inputs=options.block_inputs,
        activations=parse_bytes(config.activations),
        choose_limit=config.correct.limit == "auto",
        weighted=config.correct.weighted,
        polish=config.polish.steps > 0,
        eval_rows=0 if test is None else len(test.rows),
        eval_batch=config.eval.batch_size,
        subspace=config.lsp.subspace,
        nnz=config.lsp.nnz,
    )
    if config.method == "emloc":
        setting = _emulated(setting, config.emulator, session, len(train.rows))
    return [method], setting


def emulate_setting(
    config: EmulateConfig, session: Session, data: Dataset, *, stream: bool
) -> tuple[list[str], Setting]:
    """The stages to plan and the setting of building an emulator."""
    setting = Setting(
        **_rows([data], config.data, session),
        remat=config.model.remat,
        stream=stream,
        activations=parse_bytes(config.activations),
    )
    return ["emulate"], _emulated(setting, config.emulator, session, len(data.rows))


def correct_setting(
    config: CorrectConfig,
    session: Session,
    adapters: Any,
    emulator: Any,
    batches: Sequence[Any],
    *,
    stream: bool,
) -> tuple[list[str], Setting]:
    """The stages to plan and the setting of a correction.

    Args:
      config: all options.
      session: of the original.
      adapters: to correct.
      emulator: its parameters, perhaps abstract; the ratio is that of its largest kernel.
      batches: that choose the limit, or weigh the correction.
      stream: whether the original is read a block at a time.
    """
    ratios = _ratios(session, emulator)
    rows, length = next((batch["tokens"].shape for batch in batches), (1, 8))
    length = max([batch["tokens"].shape[1] for batch in batches], default=length)
    tiles = max([tiles_of(batch) for batch in batches], default=0)
    setting = Setting(
        ratio=max(ratios.values(), default=0.5),
        where=_exactly(ratios),
        lora_where=_exactly(adapters),
        lora_rank=_largest_rank(adapters),
        **_row(length, tiles, session),
        calibration_batch=rows,
        calibration_rows=max(1, sum(batch["tokens"].shape[0] for batch in batches)),
        remat=config.model.remat,
        stream=stream,
        gradients=False,
        activations=parse_bytes(config.activations),
        choose_limit=config.correct.limit == "auto",
        weighted=config.correct.weighted,
    )
    return ["correct"], setting


def merge_setting(adapters: Any, *, stream: bool) -> tuple[list[str], Setting]:
    """The stages to plan and the setting of a merge."""
    lora, _ = split_whole(adapters)
    setting = Setting(lora_where=_exactly(lora), lora_rank=_largest_rank(lora), stream=stream)
    return ["merge"], setting


def batch_shape(data: Dataset, options: DataOptions) -> tuple[int, int]:
    """Tokens per row of the widest batch, and tiles of images."""
    if options.packing:
        return options.max_length, 0
    longest: Any = max(data.examples, key=lambda example: len(example.tokens))
    one = dataclasses.replace(data, examples=[longest])
    batch = evaluation_batches(one, options, batch_size=1)[0]
    return batch["tokens"].shape[1], tiles_of(batch)


def tiles_of(batch: Mapping[str, Any]) -> int:
    """Tiles of every row of a batch; 0 where rows have no images."""
    return batch["tiles"].shape[1] if "tiles" in batch else 0


def _rows(splits: Sequence[Dataset], options: DataOptions, session: Session) -> dict[str, Any]:
    """What a plan says of the rows of some splits."""
    lengths, tiles = zip(*(batch_shape(data, options) for data in splits), strict=True)
    return _row(max(lengths), max(tiles), session)


def _row(length: int, tiles: int, session: Session) -> dict[str, Any]:
    """`length` counts text alone; a batch may hold more tiles than its longest row has."""
    config = session.base.config
    images = tiles * config.tile_tokens if isinstance(config, InternVLConfig) else 0
    return {"length": max(1, length - images), "tiles": tiles}


def _emulated(setting: Setting, options: EmulatorOptions, session: Session, rows: int) -> Setting:
    """A setting with what an emulator's options say.

    Raises:
      ConfigError: ranks that only the calibration will tell.
    """
    paths = compressed_paths(session, options)
    if options.skip:
        skipped = set(select(options.skip, paths))
        paths = [path for path in paths if path not in skipped]
    if options.energy is not None:
        raise ConfigError(
            f"emulator.energy={options.energy:g} leaves the ranks to the calibration, so that no "
            "plan can be held against memory_budget. Give emulator.ratio or emulator.budget."
        )
    if options.ratio is not None:
        ratio = options.ratio
    elif options.ratios is not None:
        ratio = max(options.ratios.values())
    else:
        assert options.budget is not None
        leaves = flatten_leaves(session.base.params)
        whole = sum(leaves[path].size * leaves[path].dtype.itemsize for path in paths)
        ratio = min(0.99, parse_bytes(options.budget) / whole)
    return setting.replace(
        ratio=ratio,
        where=_exactly(paths),
        gradients=options.weighting == "two_sided",
        moments=options.moments,
        calibration_rows=min(options.calibration_rows, rows),
        calibration_batch=min(options.calibration_batch, options.calibration_rows),
    )


def _ratios(session: Session, emulator: Any) -> dict[str, float]:
    """Kept / original parameters of every compressed kernel."""
    boxes = flatten_leaves(emulator)
    found = {}
    for path, spec in session.kernels.items():
        rank = getattr(boxes.get(path), "rank", None)
        if rank is not None:
            found[path] = rank * (spec.d_in + spec.d_out) / (spec.d_in * spec.d_out)
    return found


def _largest_rank(adapters: Mapping[str, Adapter]) -> int:
    return max(adapter.rank for adapter in adapters.values())


def _exactly(paths: Any) -> tuple[str, ...]:
    return tuple(re.escape(path) for path in paths)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
