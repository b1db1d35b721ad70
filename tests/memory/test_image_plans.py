"""Plans of InternVL and FLUX: published sizes, the programs that run, and what is refused."""

from pathlib import Path

import jax
import numpy as np
import pytest

from emloc_jax.adapters import attach
from emloc_jax.errors import ConfigError, PlanError
from emloc_jax.kernels import intercept
from emloc_jax.memory import (
    Budget,
    Planner,
    Setting,
    abstract_adapters,
    abstract_emulator,
    abstract_model,
    nearest,
    require_fits,
    target_named,
)
from emloc_jax.memory._emloc_stages import calibration, emulator_alone, emulator_training, merging
from emloc_jax.memory._stage import quick_figures, tree_bytes
from emloc_jax.memory._trained_stages import inference
from emloc_jax.models import grid_ids, image_token_masks
from emloc_jax.training import (
    FlowBatches,
    LatentData,
    init_state,
    make_flow_loss,
    make_loss,
    make_optimizer,
    make_schedule,
    make_train_step,
)
from tests.memory.image_models import CASES, IMAGE_TOKEN, WHOLE, tiny_case, wide
from tests.memory.models import batch_of, real, tiny

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


@pytest.mark.parametrize(
    ("name", "billions", "vision"),
    [
        ("internvl2.5-8b", 8.08, 0.304),
        ("internvl2.5-26b", 25.51, 5.54),
        ("internvl2.5-38b", 38.39, 5.54),
        ("flux.1-dev", 11.90, None),
    ],
)
def test_published_models_have_their_published_sizes(name, billions, vision):
    found = abstract_model(SHAPES / name)
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.006)
    if vision is not None:
        size = sum(leaf.size for leaf in jax.tree.leaves(found.params["vision"]))
        assert size / 1e9 == pytest.approx(vision, abs=0.006)
        assert found.kind.image_tokens(Setting(tiles=7)) == 7 * 256


def real_batch(name, setting, config):
    """Arrays, from the library's own batches where pictures are drawn."""
    if name == "flux":
        shapes = ((4, setting.latents, 8), (4, setting.length, 12), (4, 10))
        latents = [np.ones(shape, np.float32) for shape in shapes]
        data = LatentData(*latents, grid_ids(2, 3))
        return FlowBatches(data, batch_size=setting.batch_size, guidance=1.0).batch(0)
    images = setting.tiles * config.tile_tokens
    batch = batch_of(setting.replace(length=setting.length + images))
    batch["tokens"][:, :images] = IMAGE_TOKEN
    rows = (setting.batch_size, setting.tiles)
    batch["pixels"] = np.zeros((*rows, 16, 16, 3), np.float32)
    return batch | {"tiles": np.ones(rows, np.int32)}


@pytest.mark.parametrize("name", CASES)
def test_a_planned_step_is_the_step_that_runs(name):
    planner, setting = tiny_case(name)
    abstract = planner.abstract
    batch = real_batch(name, setting, abstract.model.config)
    shapes = abstract.kind.batch(setting, setting.batch_size)
    described = jax.tree.map(lambda a: (a.shape, a.dtype), (dict(batch), shapes))
    assert described[0] == described[1]
    apply = intercept(abstract.model.clone(remat="block").apply)
    schedule = make_schedule(1e-3, steps=10, warmup=2)
    tx = make_optimizer(schedule)
    step = make_train_step(
        make_flow_loss(apply) if name == "flux" else make_loss(apply, chunk=setting.chunk),
        tx,
        combine=lambda adapters, frozen, key: attach(frozen, adapters),
        schedule=schedule,
    )
    state = init_state(real(abstract_adapters(abstract, setting)), tx)
    ran = quick_figures(step.lower(state, real(abstract_emulator(abstract, setting)), batch))
    (planned,) = planner.stages(emulator_alone, setting)
    assert planned.program == ran and planned.device == ran.peak
    # As `finetune` trains, the original's kernels lie beside it.
    beside = next(emulator_training(abstract, setting, target_named())).resident
    assert 0 < beside["original"] < tree_bytes(abstract.params)


@pytest.mark.parametrize("name", CASES)
def test_training_on_the_emulator_takes_less_than_running_the_original(name):
    """By the compiler's own figures, in fp32, where weights outweigh activations."""
    abstract = abstract_model(wide(name), dtype="float32", compute_dtype="float32")
    where, rows = (abstract.kind.layers,), dict(latents=6, length=4)
    if name == "internvl":
        where, rows = (*where, "vision/layers/.*"), dict(tiles=1, length=4)
    setting = Setting(
        ratio=0.25, where=where, lora_where=where, lora_rank=4, chunk=8, stream=False, **rows
    )
    infer, train = Planner(abstract).plan(["inference", "emulator"], setting).stages
    assert train.device < infer.device


@pytest.mark.parametrize("name", CASES)
def test_other_stages_hold_the_original_whole(name):
    planner, setting = tiny_case(name)
    whole = tree_bytes(planner.abstract.params)
    for maker in (inference, calibration, merging):
        (stage,) = planner.stages(maker, setting)
        assert stage.parts["parameters"] >= whole, stage.name
        assert all(size > 0 for size in stage.parts.values()), stage.parts


def test_a_mask_for_each_part_of_an_internvl():
    planner, setting = tiny_case("internvl")
    abstract = planner.abstract
    batch = real_batch("internvl", setting, abstract.model.config)
    masks, expected = abstract.kind.mask(batch), image_token_masks(batch)
    assert masks.keys() == expected.keys()
    assert abstract.kind.mask(batch_of(setting)).shape == (2, 16)  # no tiles, no parts


def test_streaming_is_not_proposed_for_what_is_held_whole():
    planner, setting = tiny_case("internvl")
    room = Budget(device=planner.plan(["inference"], setting).device - 1)
    found = nearest(planner, ["inference"], setting, room)
    assert found is not None and not found.stream and found.tiles == 3
    with pytest.raises(PlanError, match=r"and tiles=3.*What would have to give: a smaller model"):
        require_fits(planner, ["inference"], setting, Budget(device=1000))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("text", dict(tiles=1), "model of text"),
        ("text", dict(latents=4), "model of text"),
        ("internvl", dict(latents=4), "tiles of one size"),
        ("internvl", dict(tiles=2, stream=True), "stream=false"),
        ("flux", dict(), "height and width"),
        ("flux", dict(latents=4, tiles=1), "leave tiles out"),
        ("flux", dict(latents=4, stream=True), "stream=false"),
    ],
)
def test_rows_that_a_model_does_not_read(name, changes, words):
    planner = Planner(tiny()) if name == "text" else tiny_case(name)[0]
    with pytest.raises(ConfigError, match=words):
        planner.plan(["inference"], WHOLE.replace(**changes))


def test_sizes_below_zero():
    with pytest.raises(ConfigError, match="tiles is -1"):
        Setting(tiles=-1)
