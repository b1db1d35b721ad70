"""A checkpoint of `lsp_adamw` is not taken up by a run with other projectors."""

import jax.numpy as jnp
import pytest

from emloc_jax.errors import ResumeError
from emloc_jax.training import init_state
from emloc_jax.training._run_checkpoints import RunCheckpoints
from tests.offload.lsp_case import compressing, random_tree


def test_positions_are_compared(tmp_path):
    params = random_tree(0)
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, init_state(params, compressing()), None, {})
    checkpoints.wait()
    state, _ = checkpoints.restore(1, init_state(params, compressing()))
    assert jnp.array_equal(state.trainables["bias"], params["bias"])
    with pytest.raises(ResumeError, match="other projectors than this run: 4 of 4"):
        checkpoints.restore(1, init_state(params, compressing(seed=1)))
    checkpoints.close()
