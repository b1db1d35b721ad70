"""`kill -9` at random moments, then `--resume`: the same bits as without."""

import functools
import random

import pytest

from tests.cli.killing import Runs, die_in_fit, die_while_saving, kill_after, lines, records

CHANCE = random.SystemRandom()
LSP = [
    "method=lsp",
    "train.steps=16",
    "lsp.train={'layers/mlp/down_proj': subspace, '.*/scale': device, 'embed_tokens/.*': host}",
    "lsp.nnz=2",
    "lsp.refit_every=4",
    "lsp.fit_steps=5",
    "lsp.threshold=0.05",
    "lsp.calibration_rows=4",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def start(common):
    """From options and a folder to the arguments of a run."""
    without = ["eval.scores=[]", "data.test=null", "train.save_every=1"]
    return lambda run, *options: ["finetune", *common, *without, *options, f"output={run}"]


def test_a_killed_run_ends_with_the_same_bits(tmp_path, runs, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.finish(start(whole, "train.steps=20"))
    moments = sorted(CHANCE.sample(range(2, 18), 3))
    for count, step in enumerate(moments):
        process = runs.start([*start(killed, "train.steps=20"), *(["--resume"] if count else [])])
        kill_after(process, killed, step, CHANCE.uniform(0, 0.05))
    runs.finish([*start(killed, "train.steps=20"), "--resume"])
    for name in ("adapter", "adapter_corrected"):
        one, other = (
            (run / name / "adapter_model.safetensors").read_bytes() for run in (whole, killed)
        )
        assert one == other, f"{name} differs after kills at steps {moments}"
    assert lines(killed) == 20


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["train.clip=null"], id="alone"),
        pytest.param(
            ["train.accumulation=2", "lsp.wire=bfloat16"],
            id="accumulation",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_killed_lsp_run_ends_with_the_same_bits(tmp_path, runs, start, options):
    """Killed in a check of the projectors, while a checkpoint is written, and anywhere."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.finish(start(whole, *LSP, *options))
    arguments = start(killed, *LSP, *options)

    # Each check fits two pairs; the first comes before any step, the second before step 5.
    fit, save, step = CHANCE.randint(3, 4), CHANCE.randint(1, 4), CHANCE.randint(9, 11)
    pause = CHANCE.uniform(0, 0.05)
    print(f"kills: fit {fit}, saving {save}, {pause} s after step {step}")  # shown on a failure
    process = runs.start(arguments, moment=functools.partial(die_in_fit, fit))
    process.join()
    assert process.exitcode == -9 and lines(killed) == 4
    resume = [*arguments, "--resume"]
    process = runs.start(resume, moment=functools.partial(die_while_saving, save))
    process.join()
    assert process.exitcode == -9 and 4 <= lines(killed) <= 9
    process = runs.start(resume)
    kill_after(process, killed, step, pause)
    assert process.exitcode == -9
    runs.finish(resume)

    one, other = ((run / "merged" / "model.safetensors").read_bytes() for run in (whole, killed))
    assert one == other
    assert records(killed) == records(whole) and lines(killed) == 16


@pytest.mark.slow
def test_the_demo(tmp_path):
    """The demo's claims on its own test rows; about ten minutes."""
    from emloc_jax.cli._demo import demo

    report = demo(str(tmp_path / "demo"))
    scores = {stage.name: stage.scores["exact_match"] for stage in report.stages}
    corrected = scores["adapter on the original, corrected"]
    assert corrected >= scores["zero-shot"] + 0.5
    assert corrected >= scores["adapter on the original, uncorrected"]
