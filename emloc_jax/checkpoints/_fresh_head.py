"""A head that a checkpoint lacks, asked for by the number of its labels."""

from typing import Any

import numpy as np

from emloc_jax.checkpoints._source import WeightSource
from emloc_jax.checkpoints._stored_names import stored_names
from emloc_jax.errors import CheckpointError, UnsupportedArchitectureError
from emloc_jax.models import hf_storage

__all__ = ["fresh_parameter", "with_labels"]


def with_labels(config: Any, num_labels: int, source: WeightSource, where: str) -> Any:
    """The config of the same model under a classification head of so many labels.

    Args:
      config: what `config.json` describes.
      num_labels: outputs of the head.
      source: an open checkpoint.
      where: the checkpoint's place, for the message.

    Raises:
      UnsupportedArchitectureError: the model cannot have a classification head here.
      CheckpointError: the checkpoint has a classifier already, with another number of labels.
      ConfigError: `num_labels` is no positive whole number.
    """
    if not hasattr(config, "with_labels"):
        raise UnsupportedArchitectureError(
            f"num_labels={num_labels} was asked for, but a {config.model_type} model has no "
            "classification head here; encoders of text and of images do. Leave num_labels out."
        )
    wanted = config.with_labels(num_labels)
    storage = hf_storage(wanted)
    names = stored_names(source.tensors, storage)
    kernel = storage.tensors["classifier/kernel"].name
    if kernel in names:
        found = source.tensors[names[kernel]].shape[0]
        if found != num_labels:
            raise CheckpointError(
                f"num_labels={num_labels} was asked for, but {where} has a classifier of {found} "
                "labels. Leave num_labels out to use it, or give a checkpoint of the encoder alone."
            )
    return wanted


def fresh_parameter(path: str, shape: tuple[int, ...], deviation: float, seed: int) -> np.ndarray:
    """A new parameter of a head: a normal kernel, a zero bias, as transformers makes them.

    Args:
      path: its path, which the draw depends on besides the seed.
      shape: its shape here.
      deviation: standard deviation of a kernel.
      seed: of the draw.

    Returns:
      fp32.

    >>> fresh_parameter("classifier/bias", (2,), 0.02, 0).tolist()
    [0.0, 0.0]
    """
    if not path.endswith("/kernel"):
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([seed, *path.encode()])
    return (deviation * rng.standard_normal(shape)).astype(np.float32)
