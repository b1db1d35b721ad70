"""Training: rows, batches, loss, optimizer, step, loop, evaluation."""

from emloc_jax.training._batches import Batches, BatchIterator, packed_batches, padded_batches
from emloc_jax.training._chat import prompt_text
from emloc_jax.training._classifier import (
    LabelReport,
    evaluate_labels,
    label_inputs,
    make_label_head_loss,
    make_label_logits,
    make_label_loss,
)
from emloc_jax.training._encode import Example, encode_rows, prompt_tokens
from emloc_jax.training._encode_labelled import (
    LabelledExample,
    encode_labelled_rows,
    label_names,
    pad_labelled_examples,
)
from emloc_jax.training._evaluate import (
    Answer,
    GenerationReport,
    LossReport,
    evaluate_generation,
    evaluate_loss,
    mean_loss,
)
from emloc_jax.training._flow_batches import FlowBatches
from emloc_jax.training._flow_loss import make_flow_loss, noisy_latents
from emloc_jax.training._flow_sampler import euler_sample, flow_velocity
from emloc_jax.training._flow_times import (
    TimeSampling,
    draw_times,
    resolution_shift,
    sampling_times,
    shift_times,
)
from emloc_jax.training._glue import GLUE_TASKS, GlueTask, glue_task, read_glue_rows
from emloc_jax.training._hub_rows import hub_records, read_hub_rows
from emloc_jax.training._image_file import image_size, open_image
from emloc_jax.training._image_processor import ImageProcessor
from emloc_jax.training._image_rows import (
    ImageRow,
    LabelledImage,
    encode_image_rows,
    pad_labelled_images,
    read_image_folder,
    read_image_rows,
)
from emloc_jax.training._image_tokens import (
    ImageExample,
    ImageTokens,
    image_examples,
    pad_image_examples,
)
from emloc_jax.training._instructions import read_instruction_rows
from emloc_jax.training._label_metrics import check_label_metrics, label_metrics
from emloc_jax.training._labelled_rows import LabelledRow, read_labelled_rows
from emloc_jax.training._latents import LatentData, read_latents, write_latents
from emloc_jax.training._loop import TrainResult, train
from emloc_jax.training._loss import Loss, chunked_cross_entropy, make_head_loss, make_loss
from emloc_jax.training._metrics_file import read_metrics
from emloc_jax.training._optimizer import decays, make_optimizer, make_schedule
from emloc_jax.training._padding import pad_examples
from emloc_jax.training._pipelined import PipelinedStep
from emloc_jax.training._rows import Row, read_rows
from emloc_jax.training._run_checkpoints import RunCheckpoints
from emloc_jax.training._scores import (
    Score,
    exact_match,
    json_equal,
    last_number,
    register_score,
    score_named,
)
from emloc_jax.training._state import TrainState, init_state
from emloc_jax.training._step import Combine, TrainStep, make_train_step
from emloc_jax.training._tiles import cut_tiles, tile_grid
from emloc_jax.training._update import Update, cut_batch, make_update

__all__ = [
    "GLUE_TASKS",
    "Answer",
    "BatchIterator",
    "Batches",
    "Combine",
    "Example",
    "FlowBatches",
    "GenerationReport",
    "GlueTask",
    "ImageExample",
    "ImageProcessor",
    "ImageRow",
    "ImageTokens",
    "LabelReport",
    "LatentData",
    "LabelledImage",
    "LabelledExample",
    "LabelledRow",
    "Loss",
    "LossReport",
    "PipelinedStep",
    "Row",
    "RunCheckpoints",
    "Score",
    "TimeSampling",
    "TrainResult",
    "TrainState",
    "TrainStep",
    "Update",
    "check_label_metrics",
    "chunked_cross_entropy",
    "cut_batch",
    "cut_tiles",
    "decays",
    "draw_times",
    "encode_image_rows",
    "encode_labelled_rows",
    "encode_rows",
    "euler_sample",
    "evaluate_generation",
    "flow_velocity",
    "evaluate_labels",
    "evaluate_loss",
    "mean_loss",
    "exact_match",
    "glue_task",
    "hub_records",
    "image_examples",
    "image_size",
    "init_state",
    "json_equal",
    "label_inputs",
    "label_metrics",
    "label_names",
    "last_number",
    "make_flow_loss",
    "make_head_loss",
    "make_label_head_loss",
    "make_label_logits",
    "make_label_loss",
    "make_loss",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "make_update",
    "noisy_latents",
    "open_image",
    "packed_batches",
    "pad_examples",
    "pad_image_examples",
    "pad_labelled_examples",
    "pad_labelled_images",
    "padded_batches",
    "prompt_text",
    "prompt_tokens",
    "read_glue_rows",
    "read_hub_rows",
    "read_image_folder",
    "read_image_rows",
    "read_instruction_rows",
    "read_labelled_rows",
    "read_latents",
    "read_metrics",
    "read_rows",
    "register_score",
    "resolution_shift",
    "sampling_times",
    "score_named",
    "shift_times",
    "tile_grid",
    "train",
    "write_latents",
]
