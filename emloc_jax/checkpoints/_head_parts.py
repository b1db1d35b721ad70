"""Which parameters a classification head has, and the modules of torch that hold them."""

from collections.abc import Iterable
from typing import Any

from emloc_jax.checkpoints._pretrained import Pretrained
from emloc_jax.models import HfTensor, hf_storage

__all__ = ["head_parameters", "head_tensors", "saved_module", "saved_tensors"]

# The head of every classifier of transformers here; RoBERTa's holds two layers.
_CLASSIFIER = "classifier"
# PEFT adds both to `modules_to_save` of a text classifier, whichever the model has.
_ADDED = (_CLASSIFIER, "score")


def head_tensors(config: Any) -> dict[str, HfTensor]:
    """Every parameter of a classification head, pooler included, with its tensor.

    Args:
      config: of a model; one without such a head has none.

    Returns:
      Path to tensor.

    >>> from emloc_jax.models import EncoderConfig
    >>> config = EncoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                        num_layers=2, num_heads=4, model_type="roberta").with_labels(3)
    >>> [tensor.class_name for tensor in head_tensors(config).values()][::2]
    ['classifier.dense.weight', 'classifier.out_proj.weight']
    """
    storage = hf_storage(config)
    tensors = storage.tensors.items()
    return {path: tensor for path, tensor in tensors if path.split("/")[0] in storage.heads}


def head_parameters(base: Pretrained) -> tuple[str, ...]:
    """Paths of what is trained whole in a classifier: its module `classifier`, and what is fresh.

    So BERT's pooler stays as it was pretrained, as with PEFT, unless it had to be made.

    Args:
      base: a classifier; another model has none.
    """
    return tuple(
        path
        for path, tensor in head_tensors(base.config).items()
        if saved_module(tensor.class_name) == _CLASSIFIER or path in base.fresh
    )


def saved_module(name: str) -> str:
    """The module that PEFT saves whole for a tensor of a head.

    >>> saved_module("classifier.out_proj.weight"), saved_module("bert.pooler.dense.bias")
    ('classifier', 'bert.pooler.dense')
    """
    inside = name.startswith(f"{_CLASSIFIER}.")
    return _CLASSIFIER if inside else name.rpartition(".")[0]


def saved_tensors(config: Any, modules: Iterable[str]) -> tuple[dict[str, HfTensor], list[str]]:
    """The parts of a head that `modules_to_save` asks for, and the entries that ask for more.

    As PEFT takes it, an entry stands for all modules whose names end with it.

    Args:
      config: of the model.
      modules: the entries.

    Returns:
      Path to tensor; and what is no part of a head.

    >>> from emloc_jax.models import EncoderConfig
    >>> config = EncoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                        num_layers=2, num_heads=4).with_labels(3)
    >>> found, others = saved_tensors(config, ["classifier", "score", "embeddings"])
    >>> list(found), others
    (['classifier/kernel', 'classifier/bias'], ['embeddings'])
    """
    head, every = head_tensors(config), hf_storage(config).tensors
    found, others = {}, []
    for entry in modules:
        inside = {path: t for path, t in every.items() if _within(entry, t.class_name)}
        if inside.keys() <= head.keys() and (inside or (head and entry in _ADDED)):
            found |= inside
        else:
            others.append(entry)
    return found, others


def _within(entry: str, name: str) -> bool:
    """Whether a tensor lies in a module whose name is the entry or ends with it."""
    return f".{entry}." in f".{name}"
