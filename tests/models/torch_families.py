"""Tiny torch GPT-2s, BERTs and RoBERTas, and their weights in our tree."""

import functools

import numpy as np
import torch
import transformers

from emloc_jax.models import config_from_hf
from tests.models.torch_tree import tree_of

GPT2 = dict(
    vocab_size=53, n_positions=24, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
ENCODER = dict(
    vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=24, type_vocab_size=2, initializer_range=0.3,
)  # fmt: skip
# name -> (class, what differs)
VARIANTS = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        dict(tie_word_embeddings=False, n_inner=40, activation_function="gelu"),
    ),
    "bert-labels": ("BertForSequenceClassification", dict(num_labels=5)),
    "bert-mlm": ("BertForMaskedLM", dict(hidden_act="gelu_new")),
    "bert": ("BertModel", dict(type_vocab_size=3)),
    "roberta-labels": ("RobertaForSequenceClassification", dict(num_labels=3)),
    "roberta-mlm": ("RobertaForMaskedLM", dict(hidden_act="relu", layer_norm_eps=1e-5)),
    "roberta": ("RobertaModel", dict(pad_token_id=3)),
}


@functools.cache
def torch_model(variant):
    """A randomly initialised torch model with no parameter at its trivial value."""
    name, changes = VARIANTS[variant]
    sizes = GPT2 if name.startswith("GPT2") else ENCODER
    kind = getattr(transformers, name)
    config = kind.config_class(**{**sizes, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms are born 1, biases 0 and a padding row 0: all would hide mistakes.
            parameter.add_(0.1 * torch.randn_like(parameter))
    config.architectures = [name]
    return model


def our_config(variant):
    return config_from_hf(torch_model(variant).config.to_dict())


@functools.cache
def our_params(variant):
    return tree_of(torch_model(variant), our_config(variant))


def torch_outputs(variant, tokens, **inputs):
    """What the torch model returns; arrays are turned into tensors."""
    inputs = {key: torch.asarray(np.asarray(value)).long() for key, value in inputs.items()}
    with torch.no_grad():
        return torch_model(variant)(torch.asarray(np.asarray(tokens)).long(), **inputs)
