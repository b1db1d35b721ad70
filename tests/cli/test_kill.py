"""`kill -9` at random moments, then `--resume`: the same bits as without."""

import random
import signal
import subprocess
import sys
import time

import pytest


def start(common, run, *extra):
    arguments = ["finetune", *common, "eval.scores=[]", "train.steps=40", "train.save_every=1"]
    code = "import sys; from emloc_jax.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, f"output={run}", *extra],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def wait_for_step(process, run, step):
    """Until the metrics hold `step` lines, or the process ends."""
    file = run / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.01)


def test_a_killed_run_ends_with_the_same_bits(tmp_path, common):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(common, whole))

    moments = sorted(random.SystemRandom().sample(range(2, 38), 3))
    for count, step in enumerate(moments):
        process = start(common, killed, *(["--resume"] if count else []))
        wait_for_step(process, killed, step)
        time.sleep(random.SystemRandom().uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(common, killed, "--resume"))
    for name in ("adapter", "adapter_corrected"):
        one, other = (
            (run / name / "adapter_model.safetensors").read_bytes() for run in (whole, killed)
        )
        assert one == other, f"{name} differs after kills at steps {moments}"
    assert (killed / "metrics.jsonl").read_bytes().count(b"\n") == 40


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The demo's claims on its own test rows; about ten minutes."""
    from emloc_jax.cli._demo import demo

    report = demo(str(tmp_path / "demo"))
    scores = {stage.name: stage.scores["exact_match"] for stage in report.stages}
    corrected = scores["adapter on the original, corrected"]
    assert corrected >= scores["zero-shot"] + 0.5
    assert corrected >= scores["adapter on the original, uncorrected"]
