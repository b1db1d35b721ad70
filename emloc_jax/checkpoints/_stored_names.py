"""Under which names a checkpoint stores the tensors of a model."""

from collections.abc import Collection, Iterator

from emloc_jax.models import HfStorage, HfTensor

__all__ = ["stored_names"]

# TensorFlow's words for a norm's scale and bias, kept by early BERT checkpoints.
_OLD_WORDS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def stored_names(names: Collection[str], storage: HfStorage) -> dict[str, str]:
    """The tensors that are there: name as `HfTensor` has it -> name in the checkpoint.

    A checkpoint of the bare model has no prefix (`wte.weight` for `transformer.wte.weight`), and
    one of a model with a head has it; either serves the other, as in transformers.

    Args:
      names: what the checkpoint holds.
      storage: the model's.

    >>> from emloc_jax.models import HfTensor
    >>> storage = HfStorage({"norm/scale": HfTensor("bert.LayerNorm.weight", (4,))}, prefix="bert.")
    >>> stored_names(["LayerNorm.weight"], storage)
    {'bert.LayerNorm.weight': 'LayerNorm.weight'}
    """
    found = {}
    for tensor in storage.tensors.values():
        for name in _spellings(tensor, storage.prefix):
            if name in names:
                found[tensor.name] = name
                break
    return found


def _spellings(tensor: HfTensor, prefix: str) -> Iterator[str]:
    for name in (tensor.name, tensor.class_name):
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        for spelling in (name, other):
            yield spelling
            for new, old in _OLD_WORDS:
                if spelling.endswith(new):
                    yield spelling.removesuffix(new) + old
