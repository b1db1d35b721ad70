"""Parameters read a block at a time are those of the whole model."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from emloc_jax.checkpoints import CheckpointBlocks, load_pretrained, smollm2_path
from emloc_jax.errors import CheckpointError, NonFiniteError
from emloc_jax.models import MemoryBlocks, block_stack
from tests.checkpoints.tiny import save_tiny


def same(first, second):
    return jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), first, second)
    )


@pytest.mark.parametrize("family", ["llama_biased", "qwen2_tied", "smollm2"])
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_block_is_that_of_the_whole_model(tmp_path, family, scan, dtype):
    save_tiny(tmp_path, family, torch.float32, shard="4KB")
    options = dict(scan_layers=scan, dtype=dtype)
    whole = load_pretrained(tmp_path, **options)
    held = MemoryBlocks(block_stack(whole.model), whole.params)
    blocks = CheckpointBlocks(load_pretrained(tmp_path, abstract=True, **options))
    assert blocks.num_blocks == held.num_blocks == 2
    assert same(blocks.outer(), held.outer())
    for index in range(2):
        assert same(blocks.block(index), held.block(index))
        path = f"layers/{index}/mlp/down_proj/kernel"
        kernel = held.block(index)["mlp"]["down_proj"]["kernel"]
        assert np.array_equal(blocks.parameter(path), kernel)
    with pytest.raises(IndexError, match="Block 2 of 2"):
        blocks.block(2)


def test_gguf(tmp_path):
    whole = load_pretrained(smollm2_path(), tokenizer=False)
    blocks = CheckpointBlocks(load_pretrained(smollm2_path(), abstract=True, tokenizer=False))
    assert same(blocks.block(29), whole.params["layers"]["29"])
    assert same(blocks.outer(), {k: v for k, v in whole.params.items() if k != "layers"})


def spoil(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_bad_number_is_found_when_its_block_is_read(llama_folder):
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(llama_folder, name, lambda tensors: tensors[name] * np.float32(np.inf))
    blocks = CheckpointBlocks(load_pretrained(llama_folder, abstract=True))
    blocks.block(0)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        blocks.block(1)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    save_tiny(tmp_path, "smollm2")
    spoil(tmp_path, "lm_head.weight", lambda t: t["model.embed_tokens.weight"] + 1)
    base = load_pretrained(tmp_path, abstract=True)
    with pytest.raises(CheckpointError, match="copy of"):
        CheckpointBlocks(base)
