"""What a classifier is to tell apart, from the rows and from the checkpoint's own head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from emloc_jax.checkpoints import AdapterHead, Pretrained
from emloc_jax.cli._options import DataOptions, ScoreOptions
from emloc_jax.cli._rows import Rows, glue_name
from emloc_jax.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from emloc_jax.models import EncoderConfig, VisionConfig
from emloc_jax.training import (
    ImageRow,
    LabelledRow,
    check_label_metrics,
    glue_task,
    label_names,
)

__all__ = ["Task", "fit_task", "named_head", "task_of", "with_labels_of"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification.

    Attributes:
      names: of the classes, by number; empty if a number is predicted.
      metrics: what is scored.
      known: the order of the classes is the task's own, not that of the names found in rows.
      positive: the class that F1 is of, whatever order a head has: the second of the task's own.
      images: rows are images, not texts.
    """

    names: tuple[str, ...]
    metrics: tuple[str, ...]
    known: bool
    positive: int = 1
    images: bool = False

    @property
    def outputs(self) -> int:
        """Outputs of the head."""
        return len(self.names) or 1


def task_of(rows: Rows, data: DataOptions, scores: ScoreOptions) -> Task | None:
    """The classification that labelled rows are of; None for rows to continue.

    Raises:
      ConfigError: options that only language models have.
    """
    labelled = [row for row in rows if isinstance(row, LabelledRow | ImageRow)]
    if not labelled:
        return None
    for name in ("chat", "system", "packing"):
        if getattr(data, name):
            raise ConfigError(f"data.{name} is for language models; a classifier cannot use it.")
    glue = glue_name(data)
    if glue is None:
        images = isinstance(labelled[0], ImageRow)
        task = Task(label_names(labelled), ("accuracy",), known=False, images=images)
    else:
        task = Task(glue_task(glue).labels, glue_task(glue).metrics, known=True)
    if scores.scores is not None:
        task = dataclasses.replace(task, metrics=tuple(scores.scores))
    return task


def fit_task(task: Task | None, found: Pretrained, *, fresh_head: bool) -> Task | None:
    """The task with its classes in the order of the checkpoint's head, if it has one.

    Args:
      task: what the rows are of.
      found: the checkpoint, loaded abstract.
      fresh_head: a head may be made.

    Raises:
      UnsupportedArchitectureError: rows to continue, and an encoder.
      CheckpointError: the head knows other classes, or does not say which.
      ConfigError: rows to classify and a language model, a single class, or a metric that does
        not fit or lacks its package.
    """
    config, source = found.config, found.source
    if not isinstance(config, EncoderConfig | VisionConfig):
        if task is not None:
            raise ConfigError(
                f"The rows have labels, but {source} is a {config.model_type} language model. Give "
                "an encoder (of texts or of images), or rows with prompt and completion."
            )
        return None
    sees = isinstance(config, VisionConfig)
    if task is None and sees:
        raise UnsupportedArchitectureError(
            f"{source} is a {config.model_type} image encoder; finetune, eval, emulate and correct "
            "take it as a classifier, on a folder of images with a subfolder for each class, or "
            "with data.columns={image: COLUMN, label: COLUMN}."
        )
    if task is not None and task.images != sees:
        raise ConfigError(
            f"The rows are {'images' if task.images else 'texts'}, and {source} is a "
            f"{config.model_type}, which reads {'images' if sees else 'texts'}. Give rows and a "
            "model of one kind."
        )
    if task is None:
        raise UnsupportedArchitectureError(
            f"{source} is a {config.model_type} encoder; finetune, eval, emulate and correct take "
            "it as a classifier, on rows with labels: data.columns={text: COLUMN, label: COLUMN} "
            "or data.format=glue/TASK. Texts are continued by a causal language model."
        )
    task = _in_order(task, found, fresh_head)
    if len(task.names) == 1:
        raise ConfigError(
            f"All training rows have the label {task.names[0]!r}; there is nothing to tell apart."
        )
    check_label_metrics(task.metrics, len(task.names))
    return task


def _in_order(task: Task, found: Pretrained, fresh_head: bool) -> Task:
    """The task with the names that the checkpoint's head has, if it has one and names them."""
    held, source = _held_names(found), found.source
    if found.config.head != "classification":
        if not fresh_head:
            raise CheckpointError(
                f"{source} has no classification head to evaluate. Train one with emloc finetune."
            )
    elif held is not None and task.names:
        others = sorted(set(task.names) - set(held))
        if others:
            raise CheckpointError(
                f"The rows have the labels {', '.join(others[:10])}, which the head of {source} "
                f"does not know; it has {', '.join(held[:10])}{', …' if len(held) > 10 else ''}. "
                "Rename the labels, or give an encoder without a head."
            )
        positive = held.index(task.names[1]) if len(task.names) == 2 else 1
        return dataclasses.replace(task, names=held, positive=positive)
    elif found.config.num_labels != task.outputs:
        raise CheckpointError(
            f"The head of {source} has {found.config.num_labels} outputs, the rows ask for "
            f"{task.outputs}. Give rows of the same classes, or an encoder without a head."
        )
    elif not (fresh_head or task.known):
        raise CheckpointError(
            f"The head of {source} does not name its classes (nor does its adapter, if one was "
            "given), so labels cannot be told from outputs. Put their names into id2label of its "
            "config.json."
        )
    return task


def named_head(base: Pretrained, task: Task) -> Pretrained:
    """The model with the classes' names in its config, to be saved with them."""
    kind = "single_label_classification" if task.names else "regression"
    return _labelled(base, task.names or ("LABEL_0",), kind)


def with_labels_of(head: AdapterHead | None, base: Pretrained) -> Pretrained:
    """The model with the names that an adapter says of its head, if it does."""
    if head is None or not head.labels:
        return base
    return _labelled(base, head.labels, head.problem_type)


def _labelled(base: Pretrained, names: Sequence[str], kind: str | None) -> Pretrained:
    labels: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    if kind is not None:
        labels["problem_type"] = kind
    return dataclasses.replace(base, hf_config=base.hf_config | labels)


def _held_names(found: Pretrained) -> tuple[str, ...] | None:
    """Names of the classes in the checkpoint's config; None if it has only placeholders."""
    labels: dict[Any, str] = found.hf_config.get("id2label") or {}
    names = tuple(name for _, name in sorted(labels.items(), key=lambda item: int(item[0])))
    placeholders = tuple(f"LABEL_{number}" for number in range(len(names)))
    return None if names == placeholders else names
