"""A streamed emulator is the one that is made in memory, byte for byte."""

import errno
import itertools

import jax
import numpy as np
import pytest
import torch

from emloc_jax.checkpoints import CheckpointBlocks, load_emulator
from emloc_jax.emulator import CompactMoment
from emloc_jax.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    NoTokensError,
    OutputExistsError,
    RatioError,
    ResumeError,
    UnsupportedKernelError,
)
from emloc_jax.streaming import _arrays_file, stream_emulator
from tests.checkpoints.tiny import save_tiny
from tests.streaming.tiny_run import (
    CHUNK,
    batches,
    in_memory,
    layer_kernels_of,
    opened,
    same_folder,
)

MLP = "layers/mlp/.*"
RULES = [(".*/down_proj", 0.3), (".*(up|q)_proj", 0.5)]
CASES = {
    "two_sided": dict(weighting="two_sided", ratios=0.5),
    "rules": dict(
        weighting="two_sided", ratios=RULES, skip=".*/up_proj", where=".*(q|k|o|up|down)_proj"
    ),
    "one_sided": dict(weighting="one_sided", ratios=0.25, where=MLP),
    "plain": dict(weighting="plain", ratios=0.5, where=MLP),
    "energy": dict(weighting="one_sided", energy=0.8, where=MLP),
    "budget": dict(weighting="two_sided", budget=6000, where=MLP, skip=".*/gate_proj"),
    "compact": dict(weighting="two_sided", ratios=0.5, moments="compact"),
    "compact_one_sided": dict(weighting="one_sided", ratios=0.25, where=MLP, moments="compact"),
    "compact_budget": dict(weighting="two_sided", budget=6000, where=MLP, moments="compact"),
}


def stream(folder, model_folder, case, *, data=None, **options):
    load = {k: options.pop(k) for k in ("scan_layers", "compute_dtype") if k in options}
    base = opened(model_folder, abstract=True, **load)
    given = dict(where="layers/.*") | CASES[case] | options
    return stream_emulator(
        folder,
        base,
        batches()[:2] if data is None else data,
        kernels=layer_kernels_of(base, given.pop("where")),
        rules={"note": "same"},
        seed=3,
        chunk=CHUNK,
        **given,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "llama_biased", torch.float32, num_hidden_layers=3)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_same_bytes_as_in_memory(tmp_path, model_folder, case):
    data = batches() if case == "one_sided" else batches()[:2]  # the last is of another shape
    moments, _ = in_memory(tmp_path / "whole", opened(model_folder), data, **CASES[case])
    compact = [m for m in (moments or {}).values() if isinstance(m.sum, CompactMoment)]
    assert bool(compact) == case.startswith("compact")
    stream(tmp_path / "streamed", model_folder, case, data=data, activations=2000)
    assert not same_folder(tmp_path / "whole", tmp_path / "streamed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]


def test_separate_layers_have_ranks_of_their_own(tmp_path, model_folder):
    """Factors of layers that are not stacked are those of the same layers in a stack."""
    stream(tmp_path / "stacked", model_folder, "one_sided")
    rules = {"layers/1/mlp/up_proj": 0.6, "layers/./mlp/.*": 0.25}
    where = "layers/./mlp/.*"
    stream(
        tmp_path / "one", model_folder, "one_sided", scan_layers=False, ratios=rules, where=where
    )
    stacked = load_emulator(tmp_path / "stacked", None)["layers"]["mlp"]
    separate = load_emulator(tmp_path / "one", None)["layers"]
    assert separate["1"]["mlp"]["up_proj"]["kernel"].rank == 5
    for layer, name in [("0", "up_proj"), ("1", "gate_proj"), ("2", "down_proj")]:
        one, all_ = separate[layer]["mlp"][name]["kernel"], stacked[name]["kernel"]
        assert np.array_equal(one.left, all_.left[int(layer)])
        assert np.array_equal(one.right, all_.right[int(layer)])


def failing(monkeypatch, number):
    """The file number `number` finds the disk full; gives the function that mends it."""
    save, calls = _arrays_file.save_file, itertools.count(1)

    def full(*args, **kwargs):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(_arrays_file, "save_file", full)
    return lambda: monkeypatch.setattr(_arrays_file, "save_file", save)


@pytest.mark.parametrize(("case", "number"), [("two_sided", 6), ("one_sided", 4), ("budget", 9)])
def test_a_full_disk_stops_it_and_it_goes_on(tmp_path, model_folder, monkeypatch, case, number):
    stream(tmp_path / "whole", model_folder, case, where=MLP)
    out = tmp_path / "out"
    mend = failing(monkeypatch, number)
    with pytest.raises(CheckpointError, match="No space left"):
        stream(out, model_folder, case, where=MLP)
    mend()
    work = tmp_path / f".{out.name}.partial-emulate"
    assert not out.exists() and work.is_dir()
    with pytest.raises(OutputExistsError, match="holds unfinished work"):
        stream(out, model_folder, case, where=MLP)
    with pytest.raises(ResumeError, match=r"damping: None -> 0\.1"):
        stream(out, model_folder, case, where=MLP, damping=0.1, resume=True)
    with pytest.raises(ResumeError, match="moments: auto -> full"):
        stream(out, model_folder, case, where=MLP, moments="full", resume=True)
    with pytest.raises(ResumeError, match=r"data: .* -> "):
        stream(out, model_folder, case, where=MLP, data=batches()[:1], resume=True)
    read, blocks = CheckpointBlocks.block, []
    monkeypatch.setattr(
        CheckpointBlocks, "block", lambda self, index: blocks.append(index) or read(self, index)
    )
    stream(out, model_folder, case, where=MLP, resume=True)
    assert not same_folder(tmp_path / "whole", out)
    assert not work.exists()
    if case == "one_sided":
        assert blocks == [1, 2]  # block 0 and its outputs were on the disk


def test_memory_does_not_grow_with_the_blocks(tmp_path, model_folder):
    """Bytes in arrays of the device after every step, at their largest."""
    save_tiny(tmp_path / "deep", "llama_biased", torch.float32, num_hidden_layers=6)

    def largest(folder, output):
        seen = []

        def step(done, total):
            seen.append(sum(array.nbytes for array in jax.live_arrays()))

        before = sum(array.nbytes for array in jax.live_arrays())
        stream(output, folder, "two_sided", where=MLP, activations=0, on_step=step)
        return max(seen) - before

    assert largest(tmp_path / "deep", tmp_path / "a") <= largest(model_folder, tmp_path / "b")


def test_refusals_before_anything_is_written(tmp_path, model_folder):
    base = opened(model_folder, abstract=True)
    kernels, out = layer_kernels_of(base, ".*"), tmp_path / "out"
    with pytest.raises(UnsupportedKernelError, match="lm_head"):
        stream_emulator(out, base, [], kernels=kernels, ratios=0.5, weighting="plain")
    with pytest.raises(RatioError, match="exactly one"):
        stream(out, model_folder, "plain", energy=0.5)
    with pytest.raises(NoTokensError, match="no batch"):
        stream(out, model_folder, "one_sided", data=[])
    with pytest.raises(ConfigError, match="moments='most' is none of"):
        stream(out, model_folder, "one_sided", moments="most")
    with pytest.raises(ConfigError, match="no kernel to compress"):
        stream_emulator(out, base, batches(), kernels={}, ratios=0.5)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="there exists"):
        stream(tmp_path / "there", model_folder, "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_kernels_of_a_deeper_model_are_refused(tmp_path, model_folder):
    save_tiny(tmp_path / "deep", "llama_biased", torch.float32, num_hidden_layers=6)
    kernels = layer_kernels_of(opened(tmp_path / "deep", abstract=True))
    base = opened(model_folder, abstract=True)
    with pytest.raises(CheckpointError, match="model has 3 blocks"):
        stream_emulator(tmp_path / "out", base, batches(), kernels=kernels, ratios=0.5)
    assert not (tmp_path / "out").exists()


def test_a_batch_of_padding_is_told_with_the_block(tmp_path, model_folder):
    data = [batch | {"segments": 0 * batch["segments"]} for batch in batches()[:1]]
    with pytest.raises(NoTokensError, match="layers/0/mlp"):
        stream(tmp_path / "out", model_folder, "one_sided", data=data)
    spoilt = [batch | {"weights": batch["weights"] + np.float32(np.inf)} for batch in batches()[:1]]
    with pytest.raises(NonFiniteError, match="layers/2/mlp"):
        stream(tmp_path / "inf", model_folder, "two_sided", data=spoilt, where=MLP)
