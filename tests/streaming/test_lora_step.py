"""LoRA that walks the blocks gives the bits of LoRA in memory."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from emloc_jax.errors import AdapterMismatchError, ConfigError
from emloc_jax.models import MemoryBlocks, unstack_layers
from emloc_jax.streaming import StreamedLoraStep
from emloc_jax.training import train
from tests.streaming.lora_case import Case, batches, decoder, gpt2, require_same_bits

CASES = {
    "plain": (decoder, {}),
    "accumulation, dropout, pinned inputs": (
        decoder,
        {"accumulation": 2, "dropout": 0.2, "inputs_in": "pinned_host"},
    ),
    "bf16, inputs on the host": (
        lambda **options: decoder(dtype="bfloat16", **options),
        {"accumulation": 4, "inputs_in": "host"},
    ),
    "gpt2": (gpt2, {"clip": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_have_the_bits_of_ten_steps_in_memory(name):
    make, options = CASES[name]
    case = Case(make(scan_layers=True), **options)
    one, other = case.state(), case.state()
    for batch in itertools.islice(batches(), 10):
        one, expected = case.in_memory(one, case.params, batch)
        other, metrics = case.streamed(other, case.source, batch)
        require_same_bits((other, metrics), (one, expected))
    assert int(other.step) == 10
    if case.streamed.inputs_in != "pinned_host":  # arrays from there are bound to their device
        assert case.streamed.programs.backward._cache_size() == 1  # one program for all blocks


def test_both_layouts_give_the_same_bits():
    scanned = Case(decoder(scan_layers=True), accumulation=2)
    unrolled = Case(decoder(scan_layers=False), accumulation=2)
    source = MemoryBlocks(unrolled.stack, unstack_layers(scanned.params, 3))
    # The same adapters under the names of the other layout.
    adapters = {
        f"layers/{i}/{path.removeprefix('layers/')}": jax.tree.map(lambda x, i=i: x[i], adapter)
        for path, adapter in scanned.adapters.items()
        for i in range(3)
    }
    unrolled.adapters = adapters
    batch = next(batches())
    *sums, gradient = scanned.streamed.gradient_sums(scanned.state(), scanned.source, batch)
    *others, found = unrolled.streamed.gradient_sums(unrolled.state(), source, batch)
    require_same_bits(others, sums)
    for path, adapter in gradient.items():
        for i in range(3):
            own = found[f"layers/{i}/{path.removeprefix('layers/')}"]
            require_same_bits(jax.tree.leaves(own), [x[i] for x in jax.tree.leaves(adapter)])


def test_a_step_that_is_not_finite_changes_only_counters():
    case = Case(decoder(scan_layers=True))
    batch = next(batches())
    batch["weights"] = np.full_like(batch["weights"], np.inf)
    state, metrics = case.streamed(case.state(), case.source, batch)
    assert not bool(metrics["finite"])
    assert (int(state.step), int(state.skipped)) == (1, 1)
    before = case.state()
    require_same_bits((state.trainables, state.opt_state), (before.trainables, before.opt_state))


class Stream:
    """Batches whose position can be saved."""

    def __init__(self):
        self._number, self._stream = 0, batches()

    def __iter__(self):
        return self

    def __next__(self):
        self._number += 1
        return next(self._stream)

    def get_state(self):
        return {"number": self._number}

    def set_state(self, state):
        while self._number < state["number"]:
            next(self)


def test_a_run_that_stops_and_resumes_ends_with_the_same_bits(tmp_path):
    case = Case(decoder(scan_layers=True), dropout=0.1)

    def run(steps, folder=None, **options):
        step, state = case.streamed, case.state()
        return train(
            step, state, Stream(), steps=steps, frozen=case.source, folder=folder, **options
        )

    whole = run(5).state

    def stop(record):
        if record["step"] == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run(5, tmp_path / "run", save_every=2, callbacks=[stop])
    result = run(5, tmp_path / "run", save_every=2, resume=True)
    assert result.resumed_from == 2
    require_same_bits(result.state, whole)


def test_impossible_requests():
    case = Case(decoder(scan_layers=True))
    batch = next(batches())
    head = dict(zip(["lm_head/kernel"], case.adapters.values(), strict=False))
    state = dataclasses.replace(case.state(), trainables=head)
    with pytest.raises(ConfigError, match="lm_head/kernel.*outside the blocks"):
        case.streamed(state, case.source, batch)
    shorter = Case(decoder(2, scan_layers=True))
    with pytest.raises(ConfigError, match="3 blocks, but the source of its parameters 2"):
        case.streamed(case.state(), shorter.source, batch)
    with pytest.raises(AdapterMismatchError, match="the model has 3 blocks"):
        case.streamed(shorter.state(), case.source, batch)
    options = case.stack, case.head_loss, case.tx
    for wrong in ({"accumulation": 0}, {"clip": 0.0}, {"dropout": 1.0}, {"inputs_in": "disk"}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            StreamedLoraStep(*options, **wrong)
    with pytest.raises(ConfigError, match="cannot be cut into 3"):
        StreamedLoraStep(*options, accumulation=3)(case.state(), case.source, batch)
