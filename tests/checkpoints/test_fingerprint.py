"""The identity of a base: the same for every way to load it, another for every other base."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from emloc_jax.checkpoints import base_fingerprint, calibration_fingerprint, load_pretrained
from emloc_jax.models import stack_layers
from tests.checkpoints.tiny import save_tiny
from tests.checkpoints.tiny_gguf import write_gguf


def test_does_not_depend_on_how_the_base_is_loaded(tmp_path):
    save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "many", shard="4KB")
    whole = base_fingerprint(tmp_path / "one")
    assert base_fingerprint(str(tmp_path / "many")) == whole
    for options in (dict(dtype="bfloat16"), dict(scan_layers=True), dict(abstract=True)):
        assert base_fingerprint(load_pretrained(tmp_path / "one", **options)) == whole


def test_changes_with_weights_types_and_names(tmp_path, llama_folder):
    file, seen = llama_folder / "model.safetensors", {base_fingerprint(llama_folder)}
    tensors = load_file(file)
    up = "model.layers.1.mlp.up_proj.weight"
    for changed in (tensors[up] + 1e-6, tensors[up].to(torch.bfloat16)):
        save_file(tensors | {up: changed}, file, {"format": "pt"})
        seen.add(base_fingerprint(llama_folder))
    swapped = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {up: tensors[swapped], swapped: tensors[up]}, file, {"format": "pt"})
    seen.add(base_fingerprint(llama_folder))
    assert len(seen) == 4


def test_a_large_tensor_is_sampled_from_end_to_end():
    large = np.random.default_rng(0).normal(size=300_000).astype(np.float32)
    one = base_fingerprint({"w": {"kernel": large}})
    for at in (0, -1):
        other = large.copy()
        other[at] += 1
        assert base_fingerprint({"w": {"kernel": other}}) != one
    assert base_fingerprint({"w": {"kernel": large * 1.001}}) != one


def test_trees_scanned_and_unrolled_agree(llama_folder):
    params = load_pretrained(llama_folder).params
    prints = {base_fingerprint(params), base_fingerprint(stack_layers(params, 2))}
    assert len(prints) == 1 and prints.pop().startswith("params:")


def test_gguf(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama")
    write_gguf(tmp_path / "b.gguf", "llama", quantise=True)
    prints = {base_fingerprint(tmp_path / f"{x}.gguf") for x in "aba"}
    assert len(prints) == 2
    assert base_fingerprint(load_pretrained(tmp_path / "a.gguf")) in prints


def test_calibration():
    moments = {"a/kernel": (jnp.eye(3), jnp.array(5.0)), "b/kernel": (jnp.eye(2), jnp.array(5.0))}
    one = calibration_fingerprint(moments)
    assert one == calibration_fingerprint(dict(reversed(moments.items())))
    assert one != calibration_fingerprint(jax.tree.map(lambda x: x * 2, moments))
