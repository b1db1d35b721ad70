"""What `lsp_adamw` and its parts refuse, and what the message names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emloc_jax.errors import ConfigError, ProjectorError, ResumeError, UnmatchedRuleError
from emloc_jax.kernels import LoraKernel, identity_projector, make_projector
from emloc_jax.offload import check_same_projectors
from emloc_jax.offload._fit_options import FitOptions
from emloc_jax.offload._pairs import make_pairs, subspace_sizes
from tests.offload.lsp_case import KERNELS, compressing, identities, random_tree, tree

UP, MIX = KERNELS


@pytest.mark.parametrize("options, error, message", [
    ({"nnz": 7}, ProjectorError, rf"`nnz` is 7.*'{UP}'.*\(6, 5\)"),
    ({"nnz": 0}, ProjectorError, rf"`nnz` is 0.*'{UP}'"),
    ({"subspace": 11}, ProjectorError, rf"size 11.*'{UP}'.*at most 10"),
    ({"subspace": 1.5}, ProjectorError, rf"1\.5 for kernel '{UP}'"),
    ({"subspace": -2}, ProjectorError, "positive int"),
    ({"subspace": [("mix", 4)]}, ProjectorError, rf"No rule .*'{UP}'"),
    ({"subspace": [("mixx", 4)]}, UnmatchedRuleError, "mixx"),
    ({"where": "head"}, UnmatchedRuleError, "head"),
    ({"projectors": {"head/kernel": (None, None)}}, ProjectorError, "head/kernel"),
    ({"projectors": {MIX: (identity_projector(10), None)}}, ProjectorError, "12 rows"),
    ({"projectors": {UP: (identity_projector(12), None)}}, ProjectorError, r"stack axes \(2,\)"),
    ({"fit": FitOptions(time_limit=1.0)}, ConfigError, "time_limit"),
    ({"refit_every": 0}, ConfigError, "refit_every"),
    ({"clip": 0.0}, ConfigError, "clip"),
    ({"memory_kind": "disk"}, ConfigError, "disk"),
    ({"b1": 1.0}, ConfigError, "b1"),
    ({"state_dtype": jnp.int32}, ConfigError, "float dtype"),
])  # fmt: skip
def test_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        compressing(**options)


def test_at_init():
    params = random_tree(0)
    with pytest.raises(ConfigError, match="mix/kernel' is to be compressed but is not among"):
        compressing().init({"layers": params["layers"]})
    wrong = {**params, "mix": {"kernel": jnp.zeros((3, 4, 9))}}
    with pytest.raises(ConfigError, match=r"\(3, 4, 9\) in the parameters and \(3, 4, 10\)"):
        compressing().init(wrong)
    box = LoraKernel(jnp.zeros((3, 4, 10)), jnp.zeros((3, 4, 2)), jnp.zeros((2, 10)), alpha=1.0)
    with pytest.raises(ConfigError, match="'mix/kernel' is a boxed LoraKernel"):
        compressing().init({**params, "mix": {"kernel": box}})
    for dense, found in (("keep", "'keep'"), ([("bi.*", "freeze ")], "'freeze '")):
        with pytest.raises(ConfigError, match=rf"{found} about parameter 'bias'"):
            compressing(dense=dense).init(params)
    with pytest.raises(UnmatchedRuleError, match="nothing"):
        compressing(dense=[("nothing", "freeze")]).init(params)
    uncovered = compressing(where="mix", dense=[("bias", "train")])
    with pytest.raises(ConfigError, match=rf"None about parameter '{UP}'"):
        uncovered.init(params)


def test_at_update():
    params = random_tree(0)
    tx = compressing(weight_decay=0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match="Weight decay needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ConfigError, match=r"`refit_gradients`.*'mix/kernel'; found nothing"):
        tx.update(params, state, params, refit_gradients={UP: params["layers"]["up"]["kernel"]})
    masked = compressing(decay_mask={"bias": False}, weight_decay=0.1)
    with pytest.raises(ConfigError, match="differ at 'layers/up/kernel'"):
        masked.update(params, state, params)


def test_a_state_of_other_projectors():
    params = random_tree(0)
    state = compressing().init(params)
    with pytest.raises(ResumeError, match=rf"'{UP}' .*\(3, 2\), but the state has \(6, 5\)"):
        jax.jit(compressing(subspace=0.25, nnz=1).update)(params, state, params)
    with pytest.raises(ResumeError, match=f"'{MIX}' .* None, but"):
        compressing(where=UP).update(params, state, params)
    check_same_projectors(jax.tree.map(np.array, state), compressing().init(params))
    for other in ({"seed": 1}, {"nnz": 3}):
        with pytest.raises(ResumeError, match="other projectors than this run: 4 of 4"):
            check_same_projectors(state, compressing(**other).init(params))
    with pytest.raises(ResumeError, match="2 of 4"):
        check_same_projectors(state, compressing(where="mix").init(params))


def test_frozen_parameters_do_not_move_and_hold_no_moments():
    params, pairs = random_tree(0), identities()
    tx = compressing(projectors=pairs, dense="freeze", weight_decay=0.1, clip=1.0)
    state = tx.init(params)
    assert not state.dense
    big = tree({UP: jnp.ones((2, 12, 10)), MIX: jnp.ones((3, 4, 10)), "bias": jnp.full(5, 1e9)})
    updates, _ = jax.jit(tx.update)(big, state, params)
    assert not np.any(updates["bias"])
    # Nor does their gradient count in the norm: this is AdamW on the kernels, clipped.
    kernels = {k: v for k, v in big.items() if k != "bias"}
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    some = {k: params[k] for k in kernels}
    expected, _ = reference.update(kernels, reference.init(some), some)
    for key in kernels:
        got, want = jax.tree.leaves(updates[key])[0], jax.tree.leaves(expected[key])[0]
        np.testing.assert_allclose(got, want, atol=1e-7)


def test_sizes_and_draws():
    sizes = subspace_sizes(KERNELS, where=".*", subspace={"mix": 4, ".*": 0.5})
    assert sizes == {UP: (6, 5), MIX: (4, 4)}
    pairs = make_pairs(KERNELS, where=".*", subspace=0.5, nnz=2, seed=3)
    alone = make_pairs(KERNELS, where="mix", subspace=0.5, nnz=2, seed=3)
    jax.tree.map(np.testing.assert_array_equal, alone[MIX], pairs[MIX])
    other = make_pairs(KERNELS, where="mix", subspace=0.5, nnz=2, seed=4)
    assert not np.array_equal(other[MIX][0].indices, pairs[MIX][0].indices)
    assert pairs[UP][0].stack_shape == (2,) and pairs[UP][1].size == 5
    given = (make_projector(0, 12, 3, 2), None)
    kept = make_pairs(KERNELS, where=".*", subspace=0.5, nnz=2, given={MIX: given})
    assert kept[MIX] is given
    shapes = jax.eval_shape(compressing().init, random_tree(0))
    assert shapes.moments[MIX].mu.shape == (6, 5)
