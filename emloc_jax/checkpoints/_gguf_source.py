"""The tensors of a GGUF file, dequantised one at a time, under Hugging Face names."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from emloc_jax.checkpoints._gguf_config import hf_config_from_gguf
from emloc_jax.checkpoints._gguf_header import GgufTensor, read_header
from emloc_jax.checkpoints._source import TensorInfo
from emloc_jax.errors import CheckpointError

__all__ = ["GgufSource", "undo_rope_permutation"]

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """A GGUF file read as if it were the Hugging Face checkpoint it was made from.

    Opening reads the header only. `read` dequantises to fp32 (what quantisation lost is lost) and
    undoes llama.cpp's rope permutation where there is one.

    Raises:
      CheckpointError: the file is truncated or corrupt, or a tensor cannot be dequantised.
      UnsupportedArchitectureError: the model is of a family that is not supported.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata, self._stored = read_header(path)
        self._data = np.memmap(path, np.uint8, mode="r")
        # Llama 3.1's rope scaling is stored as a table; in Hugging Face it is part of the config.
        table = self._stored.pop("rope_freqs.weight", None)
        factors = None if table is None else self._bytes(table).view("<f4")
        self.hf_config: dict[str, Any] = hf_config_from_gguf(self.metadata, self._stored, factors)
        self._gguf_names = {_hf_name(name): name for name in self._stored}
        self.tensors = {
            hf: TensorInfo(self._stored[name].shape, self._stored[name].kind.name, path)
            for hf, name in self._gguf_names.items()
        }

    def raw(self, name: str) -> np.ndarray:
        """The quantised bytes of the tensor as a view of the file: (n,) uint8."""
        return self._bytes(self._stored[self._gguf_names[name]])

    def read(self, name: str) -> np.ndarray:
        """The tensor in fp32, in Hugging Face's orientation (out, in) and order of rows."""
        tensor = self._stored[self._gguf_names[name]]
        rows = self.raw(name).reshape(*tensor.shape[:-1], -1)
        try:
            array = dequantize(rows, tensor.kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise CheckpointError(
                f"Tensor {name!r} of {self.path} has the quantisation {tensor.kind.name}, which "
                "the gguf package cannot dequantise. Take another file of this model."
            ) from error
        config = self.hf_config
        if config["model_type"] == "llama":  # qwen2 and qwen3 are stored unpermuted
            if ".q_proj." in name:
                array = undo_rope_permutation(array, config["num_attention_heads"])
            elif ".k_proj." in name:
                array = undo_rope_permutation(array, config["num_key_value_heads"])
        return np.ascontiguousarray(array, dtype=np.float32)

    def _bytes(self, tensor: GgufTensor) -> np.ndarray:
        return self._data[tensor.start : tensor.start + tensor.nbytes]


def undo_rope_permutation(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows from llama.cpp's interleaved rope back to the rotate-half form of Hugging Face.

    Args:
      array: (heads * head_dim, ...), in each head the pairs (i, i + head_dim / 2) side by side.
      heads: number of query or key heads.

    Returns:
      The same rows with, in each head, all first halves before all second halves.

    >>> undo_rope_permutation(np.array([0, 2, 1, 3]), heads=1).tolist()
    [0, 1, 2, 3]
    """
    half = array.shape[0] // heads // 2
    pairs = array.reshape(heads, half, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _hf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`; unknown names stay."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, inner, kind = match.groups()
        if inner in _INNER:
            return f"model.layers.{layer}.{_INNER[inner]}.{kind}"
    elif match := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        if match[1] in _OUTER:
            return f"{_OUTER[match[1]]}.{match[2]}"
    return name
