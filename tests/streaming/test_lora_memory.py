"""The device holds two blocks, whatever the depth of the model."""

import gc

import jax

from emloc_jax.streaming import streamed_lora_programs
from tests.streaming.lora_case import Case, batches, decoder


def planned(layers, **options):
    # Adapters on one block, so that they do not grow with the model.
    case = Case(decoder(layers), where="layers/0/.*", **options)
    return case, streamed_lora_programs(case.streamed, case.params, case.adapters, next(batches()))


def test_the_peak_does_not_grow_with_the_number_of_blocks_but_for_their_inputs():
    activation = 2 * 10 * 16 * 4  # rows of a micro-batch, tokens, width, fp32
    off = [planned(n, accumulation=2, inputs_in="host")[1] for n in (3, 9)]
    assert off[1].peak() == off[0].peak() > 2 * sum(off[0].resident.values()) // 3
    assert [plan.host for plan in off] == [n * 2 * activation for n in (3, 9)]
    on = [planned(n, accumulation=2)[1] for n in (3, 9)]
    grown = {name: size - on[0].resident[name] for name, size in on[1].resident.items()}
    assert grown == {name: 0 for name in grown} | {"blocks' inputs": 6 * 2 * activation}
    assert list(on[1].lowered) == [
        "embed", "head", "update", "forward", "backward", "forward 1", "backward 1",
    ]  # fmt: skip


def test_two_blocks_live_on_the_device_and_the_rest_is_what_was_planned(monkeypatch):
    case, plan = planned(6, accumulation=2, inputs_in="host")
    state, batch = case.state(), next(batches())
    case.params = case.adapters = None
    gc.collect()
    own = {id(leaf) for leaf in jax.tree.leaves(state)}
    before = {id(array) for array in jax.live_arrays()} - own
    bytes_seen, kernels_seen = [], []

    def watch(function):
        def watched(*arguments):
            result = function(*arguments)
            live = [array for array in jax.live_arrays() if id(array) not in before]
            bytes_seen.append(sum(array.nbytes for array in live))
            kernels_seen.append(sum(array.shape == (16, 24) for array in live))
            return result

        return watched

    programs = case.streamed.programs
    for name in ("forward", "backward", "head"):
        monkeypatch.setattr(programs, name, watch(getattr(programs, name)))
    case.streamed(state, case.source, batch)
    assert len(bytes_seen) == 6 * 2 * 2 + 2
    assert max(bytes_seen) <= plan.peak()
    assert 2 <= max(kernels_seen) <= 4  # gate and up of a block, and of the next on its way
