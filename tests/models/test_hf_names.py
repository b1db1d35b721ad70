"""The map between parameter paths and Hugging Face tensors (torch's own keys: test_parity)."""

import dataclasses

from emloc_jax.models import hf_tensor_names, is_buffer
from tests.models.tiny import CONFIG


def test_kernels_are_transposed_and_nothing_else_is():
    names = hf_tensor_names(CONFIG)
    assert all(tensor.transpose == path.endswith("/kernel") for path, tensor in names.items())
    assert len({tensor.name for tensor in names.values()}) == len(names)


def test_a_tied_head_has_no_tensor():
    tied = hf_tensor_names(dataclasses.replace(CONFIG, tie_embeddings=True))
    assert set(hf_tensor_names(CONFIG)) - set(tied) == {"lm_head/kernel"}


def test_only_the_rotary_table_is_a_buffer():
    assert is_buffer("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not any(is_buffer(tensor.name) for tensor in hf_tensor_names(CONFIG).values())
