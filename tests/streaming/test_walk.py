"""Blocks come in order, no more of them live than was said, and nothing is left running."""

import threading
import weakref

import numpy as np
import pytest

from emloc_jax.streaming import walk


class Block:
    """Stands for a block's parameters; can be watched."""

    def __init__(self, index):
        self.index = index


class Source:
    num_blocks = 6

    def __init__(self):
        self.made = []

    def outer(self):
        return {}

    def block(self, index):
        if index == 4:
            raise OSError("the disk is gone")
        block = Block(index)
        self.made.append(weakref.ref(block))
        return block

    def alive(self):
        return sum(ref() is not None for ref in self.made)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_order_and_how_many_blocks_live(ahead):
    source, seen = Source(), []
    for index, block in walk(source, [3, 1, 2, 0, 3], ahead=ahead, put=lambda tree: tree):
        assert block.index == index
        del block
        seen.append(index)
        assert source.alive() <= ahead + 1
    assert seen == [3, 1, 2, 0, 3]
    assert source.alive() == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_goes_wrong_while_reading_reaches_the_caller(ahead):
    steps = walk(Source(), [3, 4, 5], ahead=ahead, put=lambda tree: tree)
    assert next(steps)[0] == 3
    with pytest.raises(OSError, match="the disk is gone"):
        list(steps)
    assert not [t for t in threading.enumerate() if t.name.startswith("blocks")]


def test_a_caller_that_stops_early_leaves_no_thread():
    steps = walk(Source(), range(4), put=lambda tree: tree)
    next(steps)
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("blocks")]


def test_arrays_arrive_on_the_device():
    class Arrays(Source):
        def block(self, index):
            return {"scale": np.full(3, index, np.float32)}

    (_, first), (_, second) = walk(Arrays(), [2, 5])
    assert first["scale"].devices() == second["scale"].devices()
    assert float(second["scale"].sum()) == 15
