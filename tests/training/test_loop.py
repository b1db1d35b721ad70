"""The loop: records, evaluations, checkpoints, and resumption to the bit within one process."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emloc_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    OutputExistsError,
    ResumeError,
)
from emloc_jax.training import RunCheckpoints, init_state, make_train_step, read_metrics, train
from tests.training.tiny_run import tiny_run
from tests.training.toy import toy_examples

TIMES = {"seconds", "tokens_per_second", "compile_seconds"}


def timeless(records):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def bits(result):
    state = result.state
    leaves = jax.tree.leaves((state.trainables, state.opt_state, state.step))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    seen = []
    result = tiny_run(
        folder,
        steps=12,
        evaluate=lambda t: {"eval_loss": float(jnp.sum(t["head"]["delta"] ** 2))},
        evaluate_every=5,
        callbacks=[seen.append],
    )
    return folder, result, seen


def test_records_go_to_file_callbacks_and_result(whole):
    folder, result, seen = whole
    assert read_metrics(folder / "metrics.jsonl") == seen == result.records
    assert [r["step"] for r in seen if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in seen if "eval_loss" in r] == [5, 10, 12]
    assert {"step", "loss", "weight", "grad_norm", "skipped", "learning_rate"} < set(seen[1])
    assert "compile_seconds" in seen[0] and "seconds" not in seen[0]
    assert all(r["seconds"] > 0 and r["tokens_per_second"] > 0 for r in seen[1:] if "loss" in r)
    assert result.compile_seconds == seen[0]["compile_seconds"]
    assert result.seconds_per_step > 0
    assert result.resumed_from is None and result.tokens_per_second > 0


def test_resumed_run_ends_with_the_same_bits_and_records(whole, tmp_path):
    _, wanted, _ = whole
    options = {
        "evaluate": lambda t: {"eval_loss": float(jnp.sum(t["head"]["delta"] ** 2))},
        "evaluate_every": 5,
    }

    def stop(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", steps=12, callbacks=[stop], **options)
    assert max(r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")) == 8
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut off by the kill
    result = tiny_run(tmp_path / "run", steps=12, resume=True, **options)
    assert result.resumed_from == 6
    assert bits(result) == bits(wanted)
    assert timeless(result.records) == timeless(wanted.records)
    assert result.records == read_metrics(tmp_path / "run/metrics.jsonl")
    # A run that is over is only opened.
    again = tiny_run(tmp_path / "run", steps=12, resume=True, **options)
    assert again.resumed_from == 12 and bits(again) == bits(wanted)
    assert again.records == result.records and again.seconds_per_step is None
    with pytest.raises(ResumeError, match="step 12, beyond 11"):
        tiny_run(tmp_path / "run", steps=11, resume=True, **options)


def test_checkpoints_are_kept_by_step_and_half_written_ones_ignored(whole, tmp_path):
    folder, wanted, _ = whole
    copy = shutil.copytree(folder, tmp_path / "run")
    steps = sorted(int(p.name) for p in (copy / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [9, 12]
    # What a kill leaves: the newest checkpoint still under its temporary name.
    (copy / "checkpoints/12").rename(copy / "checkpoints/12.orbax-checkpoint-tmp")
    result = tiny_run(copy, steps=12, resume=True)
    assert result.resumed_from == 9 and bits(result) == bits(wanted)


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    copy = shutil.copytree(whole[0], tmp_path / "run")
    for path in (copy / "checkpoints/12/state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ResumeError, match="checkpoint 12 is damaged"):
        tiny_run(copy, steps=12, resume=True)


def test_another_config_is_refused_by_key(whole, tmp_path):
    copy = shutil.copytree(whole[0], tmp_path / "run")
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(ResumeError) as info:
        tiny_run(copy, resume=True, config={"seed": 1, "model": {"width": 9}, "new": None})
    for line in (
        "model.width: saved 8, asked 9",
        "new: saved nothing, asked null",
        "seed: saved 0",
    ):
        assert line in str(info.value)
    with pytest.raises(ResumeError, match="other rows"):
        tiny_run(copy, resume=True, examples=toy_examples(5))
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_an_existing_run_is_not_overwritten(whole):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputExistsError, match="holds a run"):
        tiny_run(whole[0], steps=12)
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_resuming_where_nothing_is_saved_starts_afresh_and_says_so(whole, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="emloc_jax"):
        result = tiny_run(tmp_path / "new", steps=2, resume=True)
    assert "no whole checkpoint, starting from step 0" in caplog.text
    assert result.resumed_from is None
    assert timeless(result.records)[0] == timeless(whole[1].records)[0]


def line_loss(params, batch):
    return jnp.sum((params["w"] - batch["x"]) ** 2), jnp.float32(batch["x"].size)


def line_run(values, **options):
    tx = optax.sgd(0.1)
    batches = [{"x": np.full(2, value, np.float32)} for value in values]
    step = make_train_step(line_loss, tx)
    return train(step, init_state({"w": jnp.zeros(())}, tx), batches, **options)


def test_a_step_that_is_not_finite_is_refused_by_name_or_skipped(tmp_path):
    values = [1.0, 2.0, np.nan, 1.0]
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan"):
        line_run(values, steps=4)
    result = line_run(values, steps=4, skip_nonfinite=True)
    assert [r["skipped"] for r in result.records] == [0, 0, 1, 1]
    assert result.records[2]["loss"] is None  # JSON has no NaN
    wanted = line_run([1.0, 2.0, 1.0], steps=3)
    assert result.state.trainables["w"] == wanted.state.trainables["w"]


def test_impossible_requests(tmp_path):
    with pytest.raises(DataError, match="end before step 3 of 4"):
        line_run([1.0, 2.0], steps=4)
    with pytest.raises(ConfigError, match="no get_state"):
        line_run([1.0], steps=1, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match="no run folder"):
        line_run([1.0], steps=1, resume=True)
    with pytest.raises(ConfigError, match="save_every is 0"):
        line_run([1.0], steps=1, save_every=0)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_does_not_change_while_training_goes_on(tmp_path):
    tx = optax.sgd(1.0)
    state = init_state({"w": jnp.zeros((256, 1024)), "b": jnp.zeros(3, jnp.bfloat16)}, tx)
    bump = jax.jit(
        lambda s: s.replace(trainables=jax.tree.map(lambda x: x + 1, s.trainables)),
        donate_argnums=0,
    )
    checkpoints = RunCheckpoints(tmp_path / "c", keep=3)
    for number in range(3):
        checkpoints.save(number, state, {"at": number}, {})
        for _ in range(20):
            state = bump(state)
    checkpoints.wait()
    for number in range(3):
        restored, data = checkpoints.restore(number, state)
        assert data == {"at": number}
        assert np.all(np.asarray(restored.trainables["w"]) == 20 * number)
        assert restored.trainables["b"].dtype == jnp.bfloat16
        assert jnp.array_equal(jax.random.key_data(restored.rng), jax.random.key_data(state.rng))
    with pytest.raises(ResumeError, match=r"trainables/w: saved.*\[256, 1024\].*\[2, 2\]"):
        checkpoints.restore(2, init_state({"w": jnp.zeros((2, 2)), "b": jnp.zeros(3)}, tx))
    with pytest.raises(ResumeError, match="other trainables"):
        checkpoints.restore(2, init_state({"v": jnp.zeros((2, 2))}, tx))
    checkpoints.close()


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(
        CheckpointError, match="checkpoint 3 or the one before could not be written.*No space"
    ):
        tiny_run(tmp_path / "run", steps=4)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3]
