"""Batches: every row once per epoch, in an order that the seed gives and a saved state keeps."""

import json

import numpy as np
import pytest

from emloc_jax.errors import ConfigError, DataError, ResumeError
from emloc_jax.training import packed_batches, padded_batches
from tests.training.toy import toy_examples

EXAMPLES = toy_examples(count=23, longest=14)


def padded(examples=EXAMPLES, **options):
    return padded_batches(examples, **({"batch_size": 4, "buckets": [6, 14]} | options))


def packed(examples=EXAMPLES, **options):
    return packed_batches(examples, **({"batch_size": 3, "length": 20, "bins": 5} | options))


def rows_of(batch):
    """The rows of a batch as bytes, told apart by segments."""
    rows = []
    for line in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][line].max(initial=0) + 1):
            at = batch["segments"][line] == segment
            assert (batch["positions"][line][at] == np.arange(at.sum())).all()
            assert (np.diff(np.flatnonzero(at)) == 1).all()
            rows.append(b"|".join(batch[k][line][at].tobytes()
                                  for k in ("tokens", "targets", "weights")))  # fmt: skip
        for key in ("tokens", "targets", "weights", "positions"):
            assert not batch[key][line][batch["segments"][line] == 0].any()
    return rows


WANTED = sorted(b"|".join(a.tobytes() for a in (e.tokens, e.targets, e.weights)) for e in EXAMPLES)


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_row_comes_once_per_epoch_whole(make, epochs):
    batches = list(make(epochs=epochs))
    assert sorted(row for batch in batches for row in rows_of(batch)) == sorted(WANTED * epochs)
    for batch in batches:
        assert {k: v.dtype for k, v in batch.items()} == {
            "tokens": np.int32, "targets": np.int32, "weights": np.float32,
            "positions": np.int32, "segments": np.int32,
        }  # fmt: skip
        assert len({v.shape for v in batch.values()}) == 1


def test_padded_shapes_are_the_buckets():
    shapes = {batch["tokens"].shape for batch in padded(epochs=1)}
    assert shapes == {(4, 6), (4, 14)}
    (only,) = {batch["tokens"].shape for batch in padded(epochs=1, buckets=None)}
    assert only == (4, 32)


def test_packing_is_first_fit():
    lengths = [len(example.tokens) for example in EXAMPLES]
    bins, wanted = [], []
    for size in lengths:
        place = next((b for b in bins if sum(b) + size <= 20), None)
        if place is None and len(bins) < 5:
            bins.append(place := [])
        if place is None:  # the row fits nowhere: all bins leave
            wanted, bins = wanted + bins, [place := []]
        place.append(size)
    wanted += bins
    found = [
        np.bincount(line)[1:].tolist()
        for batch in packed(epochs=1, shuffle=False)
        for line in batch["segments"]
        if line.any()
    ]
    assert found == wanted
    assert len(found) < len(lengths) / 1.5


@pytest.mark.parametrize("make", [padded, packed])
def test_order_is_a_function_of_the_seed_and_changes_with_the_epoch(make):
    def order(seed):
        stream, rows = iter(make(seed=seed)), []
        while len(rows) < 2 * len(EXAMPLES) + 40:
            rows += rows_of(next(stream))
        return rows

    assert order(3) == order(3)
    assert order(3) != order(4)
    count = len(EXAMPLES)
    first, second = order(3)[:count], order(3)[count : 2 * count]
    assert first != second
    unshuffled = [row for batch in packed(epochs=1, shuffle=False) for row in rows_of(batch)]
    assert unshuffled[0] == rows_of(next(iter(padded(EXAMPLES[:1]))))[0]


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("epochs", [None, 2])
def test_a_saved_position_goes_on_bit_for_bit(make, epochs):
    stream, states, batches = iter(make(epochs=epochs)), [], []
    for _ in range(17):
        states.append(json.dumps(stream.get_state()))
        batch = next(stream, None)
        if batch is None:
            break
        batches.append(batch)
    for start, state in enumerate(states):
        again = iter(make(epochs=epochs))
        again.set_state(json.loads(state))
        for wanted in batches[start:]:
            batch = next(again)
            assert all((batch[key] == wanted[key]).all() for key in wanted)
        if epochs is not None and len(batches) < 17:
            assert next(again, None) is None


def test_a_position_in_other_data_is_refused():
    state = iter(padded()).get_state()
    other = [*EXAMPLES[:-1], toy_examples(1, seed=9)[0]]
    for stream in (padded(other), padded(seed=1), padded(batch_size=2), packed()):
        with pytest.raises(ResumeError, match="other rows or other batch settings"):
            iter(stream).set_state(state)


def test_impossible_requests():
    longest = max(EXAMPLES, key=lambda e: len(e.tokens))
    size = len(longest.tokens)
    with pytest.raises(DataError, match="at least one"):
        padded([])
    with pytest.raises(DataError, match=f"the row has {size} tokens, the largest bucket"):
        padded([longest], buckets=[size - 1])
    with pytest.raises(DataError, match=f"{longest.origin}: the row has {size} tokens, a sequence"):
        packed([longest], length=size - 1)
    for wrong in ({"batch_size": 0}, {"buckets": []}, {"buckets": [0]}, {"epochs": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            padded(**wrong)
