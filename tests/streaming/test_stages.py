"""Streamed loss, correction and merge give what the functions on whole trees give, bit for bit."""

import jax
import numpy as np
import pytest
import torch

from emloc_jax.adapters import attach, choose_limit, correct, correction_report, init_adapters
from emloc_jax.checkpoints import CheckpointBlocks, EmulatorBlocks, load_emulator, save_pretrained
from emloc_jax.emulator import calibrate
from emloc_jax.errors import AdapterMismatchError, OutputExistsError, ResumeError
from emloc_jax.kernels import intercept
from emloc_jax.models import MemoryBlocks, block_stack, generate
from emloc_jax.streaming import (
    AdaptedBlocks,
    StreamedCorrection,
    stream_generate,
    stream_loss,
    stream_merge,
)
from emloc_jax.training import evaluate_loss, make_loss
from tests.checkpoints.tiny import save_tiny
from tests.streaming.tiny_run import (
    CHUNK,
    batches,
    in_memory,
    layer_kernels_of,
    opened,
    same_folder,
)

WHERE = "layers/mlp/(up|down)_proj"


def random_adapters(kernels, where=WHERE):
    adapters = init_adapters(jax.random.key(0), kernels, where=where, rank=2, alpha=6)
    noise = {p: jax.random.normal(jax.random.key(1), a.lora_b.shape) for p, a in adapters.items()}
    return {p: a.replace(lora_b=0.1 * noise[p]) for p, a in adapters.items()}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    home = tmp_path_factory.mktemp("case")
    save_tiny(home / "model", "smollm2", torch.bfloat16, shard="4KB", num_hidden_layers=3)
    base = opened(home / "model", compute_dtype="bfloat16")
    in_memory(home / "emulator", base, [], weighting="plain", ratios={"layers/mlp/.*": 0.4})
    return home, base, random_adapters(layer_kernels_of(base))


def abstract(home):
    return opened(home / "model", abstract=True, compute_dtype="bfloat16")


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_blocks_of_an_emulator_are_those_of_the_whole(case):
    home, base, _ = case
    whole = MemoryBlocks(block_stack(base.model), load_emulator(home / "emulator", base))
    blocks = EmulatorBlocks(home / "emulator", abstract(home))
    assert same(blocks.outer(), whole.outer())
    for index in range(3):
        assert same(blocks.block(index), whole.block(index))


def test_loss(case):
    home, base, adapters = case
    loss = make_loss(intercept(base.model.apply), chunk=CHUNK)
    wanted = evaluate_loss(loss, attach(base.params, adapters), batches())
    options = dict(chunk=CHUNK, activations=500)
    source = CheckpointBlocks(abstract(home))
    assert stream_loss(base.model, source, batches(), adapters=adapters, **options) == wanted
    assert stream_loss(base.model, AdaptedBlocks(source, adapters), batches(), **options) == wanted
    emulator = load_emulator(home / "emulator", base)
    wanted = evaluate_loss(loss, emulator, batches())
    assert (
        stream_loss(base.model, EmulatorBlocks(home / "emulator", base), batches(), **options)
        == wanted
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation(case, temperature):
    home, base, adapters = case
    prompts = [[5, 6, 7, 8, 9], [3], [11, 12, 13]]
    options = dict(max_new_tokens=6, pad_to=4, batch_size=2, eos_ids=[40])
    if temperature:
        options |= dict(temperature=temperature, top_k=20, top_p=0.9, key=jax.random.key(3))
    apply = intercept(base.model.apply)
    wanted = generate(base.model, attach(base.params, adapters), prompts, apply=apply, **options)
    source = AdaptedBlocks(CheckpointBlocks(abstract(home)), adapters)
    assert stream_generate(base.model, source, prompts, **options) == wanted
    assert len({tuple(reply) for reply in wanted}) > 1


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_correction(case, weighted):
    home, base, adapters = case
    kernels = {path: layer_kernels_of(base)[path] for path in adapters}
    emulator = load_emulator(home / "emulator", base)
    apply = intercept(base.model.apply)
    data, moments = batches()[:2], None
    if weighted:

        def hidden(variables, b):
            places = dict(positions=b["positions"], segments=b["segments"])
            return apply(variables, b["tokens"], **places, method="hidden")

        mask = lambda b: b["segments"] > 0  # noqa: E731
        moments = calibrate(hidden, base.params, data, kernels=kernels, mask=mask)
    loss = make_loss(apply, chunk=CHUNK)
    limit, losses = choose_limit(
        adapters, base.params, emulator, loss, data, candidates=(0.5, 3.0), moments=moments
    )
    streamed = StreamedCorrection(
        adapters,
        abstract(home),
        home / "emulator",
        weights=data if weighted else None,
        kernels=kernels,
    )
    assert streamed.choose_limit(data, candidates=(0.5, 3.0), chunk=CHUNK) == (limit, losses)
    found, report = streamed.correct(0.5)
    assert same(found, correct(adapters, base.params, emulator, limit=0.5, moments=moments))
    assert report == correction_report(adapters, base.params, emulator, limit=0.5, moments=moments)
    assert same(streamed.correct(0)[0], adapters)


def test_merge(case, tmp_path):
    home, base, adapters = case
    save_pretrained(tmp_path / "whole", attach(base.params, adapters), like=base)
    stream_merge(tmp_path / "streamed", abstract(home), adapters)
    assert not same_folder(tmp_path / "whole", tmp_path / "streamed")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    with pytest.raises(OutputExistsError, match="streamed"):
        stream_merge(tmp_path / "streamed", abstract(home), adapters)


def test_merge_goes_on_after_the_last_whole_shard(case, tmp_path, monkeypatch):
    home, _, adapters = case
    stream_merge(tmp_path / "whole", abstract(home), adapters)
    read, calls = CheckpointBlocks.parameter, []

    def failing(self, path):
        calls.append(path)
        if len(calls) == 20:
            raise OSError("the plug is pulled")
        return read(self, path)

    monkeypatch.setattr(CheckpointBlocks, "parameter", failing)
    with pytest.raises(OSError, match="plug"):
        stream_merge(tmp_path / "killed", abstract(home), adapters)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(OutputExistsError, match="unfinished work"):
        stream_merge(tmp_path / "killed", abstract(home), adapters)
    with pytest.raises(ResumeError, match=r"adapters: .* -> "):
        stream_merge(tmp_path / "killed", abstract(home), None, resume=True)
    # What a process leaves that is killed while it writes a shard.
    working = tmp_path / ".killed.partial-merge"
    (working / "model" / ".model-00009.partial-0123abcd.safetensors").write_bytes(b"half")
    done = len(calls)
    stream_merge(tmp_path / "killed", abstract(home), adapters, resume=True)
    assert len(set(calls)) < done + len(calls) and len(calls) - done < len(set(calls))
    assert not same_folder(tmp_path / "whole", tmp_path / "killed")


def test_adapters_of_another_model_are_refused_before_anything_is_written(case, tmp_path):
    home, _, adapters = case
    wrong = {"layers/mlp/no_proj/kernel": next(iter(adapters.values()))}
    with pytest.raises(AdapterMismatchError, match="no kernel"):
        stream_merge(tmp_path / "merged", abstract(home), wrong)
    with pytest.raises(AdapterMismatchError, match="no kernel"):
        StreamedCorrection(wrong, abstract(home), home / "emulator")
    assert not list(tmp_path.iterdir())
