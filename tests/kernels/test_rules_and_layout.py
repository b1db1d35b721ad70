"""Rules match whole paths and refuse to match nothing; layouts round-trip."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_jax.errors import UnmatchedRuleError
from emloc_jax.kernels import Layout, get_leaf, match_rules, select, set_leaves

PATHS = ["layers/0/up/kernel", "layers/0/down/kernel", "embed/embedding"]


def test_first_match_wins_and_order_is_kept():
    assert match_rules({".*down": 1, "layers/.*": 2}, PATHS) == {PATHS[0]: 2, PATHS[1]: 1}
    assert match_rules([("layers/.*", 2), (".*down", 1)], PATHS) == {PATHS[0]: 2, PATHS[1]: 2}


@pytest.mark.parametrize("rule", ["layers", "0/up", "layers/.*/w2"])
def test_a_rule_that_matches_nothing_is_refused_with_neighbours(rule):
    with pytest.raises(UnmatchedRuleError, match="Nearest paths: .*kernel"):
        match_rules([("layers/.*", 1), (rule, 2)], PATHS)


def test_bad_expressions_and_empty_trees():
    with pytest.raises(UnmatchedRuleError, match="not a regular expression"):
        select("(", PATHS)
    with pytest.raises(UnmatchedRuleError, match="no kernels to choose from"):
        select(".*", [])


@given(st.permutations(range(4)), st.integers(1, 3), st.integers(0, 2))
def test_layout_views_are_inverses(perm, num_in, stack):
    layout = Layout(num_in, 4 - num_in, tuple(perm))
    shape = (6,) * stack + (2, 3, 4, 5)
    array = np.arange(np.prod(shape)).reshape(shape)
    canonical = layout.canonical(array)
    assert canonical.shape == (6,) * stack + layout.in_shape(shape) + layout.out_shape(shape)
    np.testing.assert_array_equal(layout.from_canonical(canonical), array)
    back = layout.from_matrix(layout.matrix(array), layout.in_shape(shape), layout.out_shape(shape))
    np.testing.assert_array_equal(back, array)


def test_layout_refuses_nonsense():
    with pytest.raises(ValueError, match="not a permutation"):
        Layout(perm=(0, 2))
    with pytest.raises(ValueError, match="fewer axes"):
        Layout(2, 2).matrix(np.zeros((2, 2)))


def test_set_leaves_copies_only_the_branch():
    tree = {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    new = set_leaves(tree, {"a/x": 5, "a/y": 6})
    assert new == {"a": {"x": 5, "y": 6}, "b": {"z": 3}}
    assert tree == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    assert new["b"] is tree["b"]
    with pytest.raises(KeyError, match="'a/w'"):
        set_leaves(tree, {"a/w": 1})
    assert get_leaf(tree, "a/y") == 2
