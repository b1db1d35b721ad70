"""The search and the contract: what is reported fits, the next larger does not."""

import random

import pytest

from emloc_jax.errors import ConfigError, PlanError
from emloc_jax.memory import Budget, Planner, Setting, largest, nearest, require_fits, smallest
from emloc_jax.memory._search import largest_index
from tests.memory.models import tiny

SETTING = Setting(batch_size=1, length=64, ratio=0.5, lora_rank=2, chunk=16, gradients=False)


@pytest.fixture(scope="module")
def planner():
    return Planner(tiny())


def train(plan):
    return next(stage for stage in plan.stages if stage.name == "train").device


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
    ("knob", "step"), [("ratio", 0.01), ("batch_size", 1), ("length", 64), ("chunk", None)]
)
def test_the_largest_fits_and_the_next_larger_does_not(planner, knob, step):
    base = SETTING.replace(length=128) if knob == "chunk" else SETTING
    target = {"ratio": {"ratio": 0.61}, "batch_size": {"batch_size": 3}, "length": {"length": 192}}
    wanted = base.replace(**target.get(knob, {"chunk": 64}))
    budget = Budget(device=planner.plan(["emloc"], wanted).device + 1)
    found = largest(planner, ["emloc"], base, budget, knob)
    assert found is not None
    assert planner.plan(["emloc"], found).fits(budget)
    value = getattr(found, knob)
    assert value >= getattr(wanted, knob)
    more = found.replace(**{knob: 2 * value if step is None else round(value + step, 2)})
    assert not planner.plan(["emloc"], more).fits(budget)


def test_what_keeps_its_budget_passes(planner):
    plan = planner.plan(["lora"], SETTING)
    exactly = Budget(device=plan.device, host=plan.host)
    assert require_fits(planner, ["lora"], SETTING, exactly) == plan
    assert not plan.fits(Budget(device=plan.device - 1))


def test_a_refusal_names_the_nearest_setting(planner):
    asked = SETTING.replace(batch_size=4, chunk=256)
    # Half the rows at a time train the same numbers; that is nearer than a lower ratio.
    alike = asked.replace(chunk=32, accumulation=2)
    room = Budget(device=planner.plan(["emloc"], alike).device)
    assert not planner.plan(["emloc"], asked.replace(chunk=32)).fits(room)
    assert nearest(planner, ["emloc"], asked, room) == alike
    with pytest.raises(PlanError, match="The nearest setting that fits: .* in 2 micro-batches"):
        require_fits(planner, ["emloc"], asked, room)


def test_a_lower_ratio_comes_before_fewer_tokens(planner):
    wanted = SETTING.replace(ratio=0.3)
    room = Budget(device=planner.plan(["emloc"], wanted).device)
    found = nearest(planner, ["emloc"], SETTING.replace(ratio=0.9), room)
    assert found is not None
    assert 0.3 <= found.ratio < 0.9 and found.length == SETTING.length
    assert planner.plan(["emloc"], found).fits(room)


def test_a_budget_below_the_smallest_plan_says_the_minimum(planner):
    least = planner.plan(["lora"], smallest(SETTING))
    with pytest.raises(PlanError) as caught:
        require_fits(planner, ["lora"], SETTING, Budget(device=1000))
    message = str(caught.value)
    assert "the least possible is" in message and "What would have to give" in message
    assert f"{least.device / 1024:.1f} KiB" in message
    with pytest.raises(PlanError, match="host memory"):
        require_fits(planner, ["emloc"], SETTING, Budget(host=10))


def test_searches_that_make_no_sense(planner):
    with pytest.raises(ConfigError, match="known are ratio"):
        largest(planner, ["lora"], SETTING, Budget(device=1), "rank")
    with pytest.raises(ConfigError, match="needs a budget"):
        largest(planner, ["lora"], SETTING, Budget(), "length")
    assert largest(planner, ["lora"], SETTING, Budget(device=1), "length") is None
