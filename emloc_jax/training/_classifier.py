"""Loss and evaluation of an encoder, of texts or of images, with a classification head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emloc_jax.errors import NonFiniteError, NoTokensError
from emloc_jax.training._label_metrics import check_label_metrics, label_metrics
from emloc_jax.training._loss import Loss

__all__ = [
    "LabelReport",
    "evaluate_labels",
    "label_inputs",
    "make_label_head_loss",
    "make_label_logits",
    "make_label_loss",
]

Logits = Callable[[Any, Mapping[str, Any]], jax.Array]


def label_inputs(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an encoder takes of a batch: pixels, or tokens, positions, segments, token types."""
    if "pixels" in batch:
        return (batch["pixels"],)
    return batch["tokens"], batch["positions"], batch["segments"], batch.get("token_types")


def label_loss(logits: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Σᵢ wᵢ lᵢ and Σᵢ wᵢ over the rows of a batch.

    Args:
        logits: (B, outputs).
        batch: its `labels` (B,) are integers, and lᵢ is the cross-entropy; or they are floats,
            there is one output, and lᵢ is its squared error. `weights` (B,) are 0 for padding.

    Returns:
        Loss sum and weight sum, both fp32 scalars.
    """
    labels, weights = jnp.asarray(batch["labels"]), jnp.asarray(batch["weights"], jnp.float32)
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        losses = (logits[:, 0] - labels) ** 2
    return jnp.sum(jnp.where(weights == 0, 0.0, losses * weights)), jnp.sum(weights)


def make_label_logits(apply: Callable[..., Any]) -> Logits:
    """`logits(params, batch) -> (B, outputs)` of an encoder.

    Args:
        apply: `model.apply` of an `Encoder` or `VisionEncoder` with a classification head, or an
            intercepted one.
    """
    return lambda params, batch: apply({"params": params}, *label_inputs(batch))


def make_label_loss(logits: Logits) -> Loss:
    """`loss(params, batch) -> (sum, weight)` over rows; see `label_loss`.

    Args:
        logits: from `make_label_logits`.

    Example:
        >>> loss = make_label_loss(lambda params, batch: jnp.zeros((2, 4)))
        >>> total, weight = loss(None, {"labels": jnp.array([3, 0]), "weights": jnp.array([1, 0])})
        >>> print(f"{total / weight:.4f}, ln 4 = {jnp.log(4):.4f}")
        1.3863, ln 4 = 1.3863
    """
    return lambda params, batch: label_loss(logits(params, batch), batch)


def make_label_head_loss(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss from the last block's output on, for trainers that walk a block stack.

    Args:
        apply: see `make_label_logits`.

    Returns:
        `head_loss(outer, x, batch) -> (loss sum, weight sum)`, with `outer` the parameters outside
        the blocks and x (B, T, D) what the last block returned.
    """

    def head_loss(outer: Any, x: jax.Array, batch: Mapping[str, Any]) -> Any:
        return label_loss(apply({"params": outer}, x, method="head"), batch)

    return head_loss


@dataclass(frozen=True)
class LabelReport:
    """Mean loss per row, metrics by name, and the number of rows."""

    loss: float
    scores: dict[str, float]
    rows: int


def evaluate_labels(
    logits: Logits,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    metrics: Sequence[str] = (),
    positive: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> LabelReport:
    """Loss and metrics over all rows of all batches.

    Args:
        logits: from `make_label_logits`; compiled once per batch shape, also over several calls
            with the same function.
        params: parameters, possibly boxed.
        batches: a finite stream (`epochs=1`).
        metrics: names, see `label_metrics`; checked on the first batch.
        positive: the class that `f1` is of.
        on_batch: called with the number of batches done, for a progress bar.

    Raises:
        NoTokensError: no row in any batch.
        NonFiniteError: a loss that is not finite.
        ConfigError: see `check_label_metrics`.

    Example:
        >>> batch = {"labels": np.array([1, 0]), "weights": np.array([1.0, 1.0])}
        >>> logits = lambda params, batch: jnp.array([[0.0, 9.0], [0.0, 9.0]])
        >>> evaluate_labels(logits, None, [batch], metrics=["accuracy"]).scores
        {'accuracy': 0.5}
    """
    compiled = jax.jit(logits)
    total = weight = 0.0  # double precision
    outputs, labels = [], []
    for done, batch in enumerate(batches, 1):
        found = np.asarray(compiled(params, batch))
        if done == 1:
            kind = np.asarray(batch["labels"]).dtype
            check_label_metrics(metrics, found.shape[-1] if np.issubdtype(kind, np.integer) else 0)
        batch_total, batch_weight = label_loss(jnp.asarray(found), batch)
        total += float(batch_total)
        weight += float(batch_weight)
        real = np.asarray(batch["weights"]) > 0
        outputs.append(found[real])
        labels.append(np.asarray(batch["labels"])[real])
        if on_batch is not None:
            on_batch(done)
    if weight == 0:
        raise NoTokensError("an evaluation was asked for, but the batches have no row.")
    if not math.isfinite(total):
        raise NonFiniteError(f"the evaluated loss is {total / weight}; look at the parameters.")
    values, truth = np.concatenate(outputs), np.concatenate(labels)
    classes = np.issubdtype(truth.dtype, np.integer)
    predictions = values.argmax(-1) if classes else values[:, 0]
    scores = label_metrics(metrics, predictions, truth, positive=positive)
    return LabelReport(total / weight, scores, len(truth))
