import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.adapters import attach, choose_limit, correct
from emloc_jax.errors import AdapterMismatchError, NonFiniteError, NoTokensError, RatioError
from emloc_jax.kernels import materialize
from tests.adapters.cases import Moment, make_case

CASE = make_case("dense", ratio=2.0, b_scale=0.5)
KERNEL = np.asarray(CASE.kernel, np.float32)


def make_batches(count=3, seed=0):
    """Inputs, and weights of which some are zero."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((6, 12)).astype(np.float32), rng.integers(0, 2, 6).astype(np.float32))
        for _ in range(count)
    ]


def loss_towards(target):
    """Weighted squared distance of the outputs to those of `target`."""

    def loss(params, batch):
        inputs, weights = batch
        error = inputs @ (materialize(params)["block"]["kernel"] - target)
        return ((error**2).sum(-1) * weights).sum(), weights.sum()

    return loss


TOWARDS_EMULATOR = loss_towards(CASE.emulated + 2.0 * CASE.lora_a @ CASE.lora_b)
AWAY = loss_towards(CASE.kernel + 2.0 * CASE.lora_a @ CASE.lora_b)


def choose(loss, batches=None, adapters=CASE.adapters, **options):
    batches = make_batches() if batches is None else batches
    return choose_limit(adapters, CASE.params, CASE.emulator, loss, batches, **options)


def mean_loss(adapters):
    attached = attach(CASE.params, adapters)
    pairs = np.array([TOWARDS_EMULATOR(attached, batch) for batch in make_batches()])
    return pairs[:, 0].sum() / pairs[:, 1].sum()


def test_the_table_holds_the_loss_of_the_corrected_original():
    limit, table = choose(TOWARDS_EMULATOR, candidates=(0.5, 3.0))
    assert list(table) == [0.0, 0.5, 3.0]
    for candidate, got in table.items():
        adapters = correct(CASE.adapters, CASE.params, CASE.emulator, limit=candidate)
        assert got == pytest.approx(mean_loss(adapters), rel=1e-5)
    assert limit == 3.0 and table[3.0] < table[0.5] < table[0.0]


def test_no_correction_wins_where_it_is_best():
    limit, table = choose(AWAY)
    assert limit == 0.0 and table[0.0] < 1e-6 < table[0.1]


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_uncorrected(seed):
    target = np.random.default_rng(seed).standard_normal((12, 10)) + KERNEL
    limit, table = choose(loss_towards(target), candidates=(0.1, 1.0))
    assert 0.0 in table and table[limit] == min(table.values()) <= table[0.0]


def test_one_trace_for_all_candidates_and_batches_and_a_single_pass():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return TOWARDS_EMULATOR(params, batch)

    _, table = choose(loss, batches=iter(make_batches()))
    assert len(traces) == 1 and len(table) == 6


def test_ties_go_to_the_smaller_limit():
    limit, table = choose(lambda params, batch: (jnp.float32(1), jnp.float32(1)))
    assert limit == 0.0 and set(table.values()) == {1.0}
    same = choose_limit(  # nothing to correct: every limit gives the same adapters
        CASE.adapters, CASE.params, CASE.params, TOWARDS_EMULATOR, make_batches(), candidates=[1, 3]
    )
    assert len(same[1]) == 3


def test_a_candidate_without_finite_loss_is_passed_over():
    def loss(params, batch):
        changed = params["block"]["kernel"].lora_b != CASE.adapter.lora_b
        return jnp.where(changed.any(), jnp.nan, 1.0), 1

    limit, table = choose(loss, candidates=[1.0])
    assert limit == 0.0 and np.isnan(table[1.0])


def test_moments_and_bound_reach_the_correction():
    moment = Moment(jnp.diag(jnp.arange(1.0, 13.0)))
    options = {"moments": {"block/kernel": moment}, "bound": "kernel"}
    _, table = choose(TOWARDS_EMULATOR, candidates=[1.0], **options)
    adapters = correct(CASE.adapters, CASE.params, CASE.emulator, limit=1.0, **options)
    assert table[1.0] == pytest.approx(mean_loss(adapters), rel=1e-5)


@pytest.mark.parametrize("batches", [[], [(np.ones((6, 12)), np.zeros(6))]])
def test_no_tokens(batches):
    with pytest.raises(NoTokensError, match="empty or every token has weight 0"):
        choose(TOWARDS_EMULATOR, batches=batches)


def test_other_bad_input():
    with pytest.raises(NonFiniteError, match="uncorrected"):
        choose(lambda params, batch: (jnp.nan, 1))
    with pytest.raises(RatioError):
        choose(TOWARDS_EMULATOR, candidates=[-1.0])
    corrected = correct(CASE.adapters, CASE.params, CASE.emulator)
    with pytest.raises(AdapterMismatchError, match="already"):
        choose(TOWARDS_EMULATOR, adapters=corrected)


def test_parameters_on_the_host():
    host = jax.tree.map(np.asarray, CASE.params)
    got = choose_limit(CASE.adapters, host, CASE.emulator, TOWARDS_EMULATOR, make_batches())
    assert got == choose(TOWARDS_EMULATOR)
