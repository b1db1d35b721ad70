"""`kill -9` at three random moments, then resume: the final trainables are equal to the bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from emloc_jax.training import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 24


def start(folder, pause=0.0):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "tests.training.tiny_run", folder, str(STEPS), str(pause)]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def last_step(folder):
    path = folder / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return max((record["step"] for record in records), default=0)


def test_three_kills_then_resume(tmp_path):
    whole = start(tmp_path / "whole")
    seed = random.SystemRandom().randrange(10**6)
    generator = random.Random(seed)
    moments = [generator.randrange(first, first + 5) for first in (1, 8, 15)]
    print(f"seed {seed}: kills after steps {moments}")  # shown when the test fails
    for moment in moments:
        process = start(tmp_path / "killed", pause=0.02)
        deadline = time.monotonic() + 120
        while last_step(tmp_path / "killed") < moment and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(tmp_path / "killed"))
    finish(whole)
    wanted, found = (np.load(tmp_path / run / "final.npz")["delta"] for run in ("whole", "killed"))
    assert np.any(wanted) and found.tobytes() == wanted.tobytes()
    records = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "killed")]
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in run] for run in records]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
