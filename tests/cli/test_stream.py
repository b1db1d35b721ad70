"""`stream=true` gives the very files that `stream=false` gives, also after kills."""

import random
import time

import pytest

from emloc_jax.cli import main
from tests.cli.killing import Runs
from tests.streaming.tiny_run import same_folder

CHANCE = random.SystemRandom()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture
def emulate(model_folder, rows_file):
    options = [
        f"model.source={model_folder}",
        f"data.train={rows_file}",
        "emulator.where=['layers/mlp/.*']",
        "emulator.ratio=0.5",
        "emulator.calibration_rows=12",
        "emulator.calibration_batch=4",
    ]
    return lambda output, *more: ["emulate", *options, *more, f"output={output}"]


@pytest.fixture
def adapter(home, model_folder):
    import jax

    from emloc_jax.adapters import init_adapters
    from emloc_jax.checkpoints import save_adapter
    from tests.streaming.tiny_run import layer_kernels_of, opened

    if not (home / "adapter").exists():
        base = opened(model_folder)
        where = "layers/mlp/(up|down)_proj"
        adapters = init_adapters(
            jax.random.key(0), layer_kernels_of(base), where=where, rank=2, alpha=4
        )
        noisy = {
            path: one.replace(lora_b=0.1 * jax.random.normal(jax.random.key(1), one.lora_b.shape))
            for path, one in adapters.items()
        }
        save_adapter(home / "adapter", noisy, base=base)
    return home / "adapter"


def test_every_stage(home, model_folder, rows_file, emulate, adapter, capsys):
    model = f"model.source={model_folder}"
    for stream in ("false", "true"):
        out = home / stream
        how = [model, f"stream={stream}"]
        given = [f"stream={stream}", "emulator.moments=compact"]
        assert main(emulate(out / "emulator", *given)) == 0
        chosen = [f"adapter={adapter}", f"emulator={home / 'false' / 'emulator'}"]
        data = [f"data.train={rows_file}", "calibration.rows=8", "correct.weighted=true"]
        assert main(["correct", *chosen, *data, *how, f"output={out / 'c'}"]) == 0
        for verb in ("merge", "export"):
            assert main([verb, f"adapter={adapter}", *how, f"output={out / verb}"]) == 0
        capsys.readouterr()
        given = [f"adapter={adapter}", *how]
        limits = [f"data.test={rows_file}", "eval.rows=4", "eval.max_new_tokens=3"]
        assert main(["eval", *given, *limits, f"output={out / 'eval'}"]) == 0
        prompt = ["prompt=['say one:']", "sampling.max_new_tokens=4"]
        assert main(["generate", *given, *prompt]) == 0
        printed = capsys.readouterr().out
        assert printed.strip()
        (out / "printed").mkdir()
        (out / "printed" / "text").write_text(printed)
    for name in ("emulator", "c", "merge", "export", "eval", "printed"):
        assert not same_folder(home / "false" / name, home / "true" / name), name
    reports = [(home / s / "c.correction.json").read_bytes() for s in ("false", "true")]
    assert reports[0] == reports[1]


def kill_at(process, folder, files, pause):
    """SIGKILL some time after the folder holds so many files."""
    while process.is_alive() and len(list(folder.rglob("*.safetensors"))) < files:
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    process.join()


@pytest.mark.parametrize("verb", ["emulate", "merge"])
def test_killed_and_resumed(tmp_path, model_folder, emulate, adapter, verb):
    runs = Runs(tmp_path)

    def start(output):
        if verb == "emulate":
            return emulate(output, "stream=true", "activations=1KiB")
        given = [f"adapter={adapter}", f"model.source={model_folder}", "stream=true"]
        return ["merge", *given, f"output={output}"]

    runs.finish(start(tmp_path / "whole"))
    moments = sorted(CHANCE.sample(range(1, 9), 3)) if verb == "emulate" else [0, 0, 1]
    pauses = [CHANCE.uniform(0, 0.1) for _ in moments]
    print(f"kills {pauses} s after {moments} files")  # shown on a failure
    working = tmp_path / f".killed.partial-{verb}"
    for count, (moment, pause) in enumerate(zip(moments, pauses, strict=True)):
        if (tmp_path / "killed").exists():
            break
        resume = ["--resume"] if count or working.exists() else []
        process = runs.start([*start(tmp_path / "killed"), *resume])
        kill_at(process, working, moment, pause)
    if not (tmp_path / "killed").exists() or working.exists():
        runs.finish([*start(tmp_path / "killed"), "--resume"])
    assert not same_folder(tmp_path / "whole", tmp_path / "killed")
    assert not working.exists()


def test_refusals(tmp_path, emulate, capsys):
    assert main(emulate(tmp_path / "emulator", "stream=maybe")) == 2
    assert "stream=maybe" in capsys.readouterr().err
    assert main([*emulate(tmp_path / "emulator", "stream=false"), "--resume"]) == 2
    assert "Give stream=true" in " ".join(capsys.readouterr().err.split())
    assert main(emulate(tmp_path / "emulator", "emulator.save_moments=true")) == 2
    assert "moments are kept by finetune alone" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
