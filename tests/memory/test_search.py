"""The search and the contract: what is reported fits, the next larger does not."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax._program_memory import ProgramMemory
from emloc_jax.errors import ConfigError, PlanError
from emloc_jax.memory import (
    Budget,
    Planner,
    Program,
    Setting,
    Stage,
    _methods,
    depends_on,
    largest,
    nearest,
    register_method,
    require_fits,
    smallest,
)
from emloc_jax.memory._search import largest_index
from tests.memory.models import tiny

SETTING = Setting(batch_size=1, length=64, ratio=0.5, chunk=16)


@depends_on("batch_size", "accumulation", "length", "ratio", "chunk")
def toy(abstract, setting, target):
    """A program that compiles at once, whose memory grows as that of a training step does."""
    rows = setting.micro_batch * setting.length
    shapes = {"weights": (round(4000 * setting.ratio),), "x": (rows, 8)}
    given = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def run(given):
        logits = jnp.zeros((min(setting.chunk, rows), 12)) + given["x"][0, 0]
        return given["weights"] * 2, jnp.sin(given["x"]), logits

    yield Stage("train", "toy", {"step": Program(target.lower(jax.jit(run), given))})


@pytest.fixture(scope="module")
def planner():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_methods, "_METHODS", dict(_methods._METHODS))
        register_method("toy", [toy])
        yield Planner(tiny())


@pytest.mark.parametrize("seed", range(20))
def test_the_index_is_the_last_that_fits_and_few_are_asked(seed):
    draw = random.Random(seed)
    limit = draw.choice([1, 7, 99, 2**20])
    place = draw.randint(0, limit)
    slope, bend = 10 ** draw.uniform(0, 8), draw.choice([0.0, 0.5])
    asked = []

    def excess(index):
        asked.append(index)
        return slope * ((index - place) + bend * (index**1.5 - place**1.5)) - 0.5

    found = largest_index(excess, limit)
    assert found == (place or None)
    assert len(asked) <= 45 and all(1 <= index <= limit for index in asked)
    assert largest_index(excess, limit, guess=limit) == found


@pytest.mark.parametrize(
    ("method", "wanted", "step"),
    [
        ("toy", {"ratio": 0.61}, 0.01),
        ("toy", {"batch_size": 3}, 1),
        ("toy", {"chunk": 32}, None),
        ("inference", {"batch_size": 3}, 1),
        ("inference", {"length": 192}, 64),
    ],
)
def test_the_largest_fits_and_the_next_larger_does_not(planner, method, wanted, step):
    ((knob, value),) = wanted.items()
    budget = Budget(device=planner.plan([method], SETTING.replace(**wanted)).device + 1)
    found = largest(planner, [method], SETTING, budget, knob)
    assert found == SETTING.replace(**wanted)
    assert planner.plan([method], found).fits(budget)
    more = found.replace(**{knob: 2 * value if step is None else round(value + step, 2)})
    assert not planner.plan([method], more).fits(budget)


def test_what_keeps_its_budget_passes(planner):
    plan = planner.plan(["toy"], SETTING)
    exactly = Budget(device=plan.device, host=plan.host)
    assert require_fits(planner, ["toy"], SETTING, exactly) == plan
    assert not plan.fits(Budget(device=plan.device - 1))


def test_a_refusal_names_the_nearest_setting(planner):
    asked = SETTING.replace(batch_size=4, chunk=256)
    # Half the rows at a time train the same numbers; that is nearer than a lower ratio.
    alike = asked.replace(chunk=32, accumulation=2)
    room = Budget(device=planner.plan(["toy"], alike).device)
    assert not planner.plan(["toy"], asked.replace(chunk=32)).fits(room)
    assert nearest(planner, ["toy"], asked, room) == alike
    with pytest.raises(PlanError, match="The nearest setting that fits: .* in 2 micro-batches"):
        require_fits(planner, ["toy"], asked, room)


@depends_on("stream")
def held(abstract, setting, target):
    """A stage that holds the original unless it is streamed."""
    program = Program(ProgramMemory(0, 100, 0, 0))
    yield Stage("train", "held", {"step": program}, {} if setting.stream else {"original": 900})


def test_streaming_comes_first(planner):
    register_method("held", [held])
    asked, room = SETTING.replace(stream=False), Budget(device=500)
    assert nearest(planner, ["held"], asked, room) == asked.replace(stream=True)
    with pytest.raises(PlanError, match="original .*The nearest setting that fits: .*stream=true"):
        require_fits(planner, ["held"], asked, room)
    # Where streaming changes nothing, it is not proposed.
    room = Budget(device=planner.plan(["toy"], SETTING.replace(ratio=0.3)).device)
    found = nearest(planner, ["toy"], SETTING.replace(ratio=0.9, stream=False), room)
    assert found is not None and not found.stream


def test_a_lower_ratio_comes_before_fewer_tokens(planner):
    wanted = SETTING.replace(ratio=0.3)
    room = Budget(device=planner.plan(["toy"], wanted).device)
    found = nearest(planner, ["toy"], SETTING.replace(ratio=0.9), room)
    assert found is not None
    assert 0.3 <= found.ratio < 0.9 and found.length == SETTING.length
    assert planner.plan(["toy"], found).fits(room)


def test_a_budget_below_the_smallest_plan_says_the_minimum(planner):
    least = planner.plan(["toy"], smallest(planner, ["toy"], SETTING))
    with pytest.raises(PlanError) as caught:
        require_fits(planner, ["toy"], SETTING, Budget(device=1000))
    message = str(caught.value)
    assert "the least possible is" in message and "What would have to give" in message
    assert f"{least.device / 1024:.1f} KiB" in message


def test_stages_that_a_setting_does_not_have_do_not_matter(planner):
    register_method("bare", [toy, depends_on("eval_rows")(lambda *_: iter(()))])
    budget = Budget(device=planner.plan(["toy"], SETTING).device)
    found = largest(planner, ["bare"], SETTING, budget, "ratio")
    assert found == largest(planner, ["toy"], SETTING, budget, "ratio") is not None


def test_searches_that_make_no_sense(planner):
    with pytest.raises(ConfigError, match="known are ratio"):
        largest(planner, ["toy"], SETTING, Budget(device=1), "rank")
    with pytest.raises(ConfigError, match="needs a budget"):
        largest(planner, ["toy"], SETTING, Budget(), "length")
    assert largest(planner, ["toy"], SETTING, Budget(device=1), "length") is None
