"""Whether a checkpoint holds exactly the tensors its config asks for; nothing is read for that."""

from emloc_jax.checkpoints._source import WeightSource
from emloc_jax.errors import CheckpointError
from emloc_jax.models import DecoderConfig, hf_tensor_names, is_buffer

__all__ = ["HEAD", "check_tensors", "listed"]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check_tensors(source: WeightSource, config: DecoderConfig, where: str) -> None:
    """Compare names and shapes of the checkpoint with the model's, and report every difference.

    Two kinds of tensors that no parameter stands for are let pass: the rotary tables that early
    `transformers` stored, and a copy of the embedding under the head's name in a tied model
    (`read_params` checks that it is a copy).

    Args:
      source: an open checkpoint.
      config: what `config.json` describes.
      where: the checkpoint's place, for the message.

    Raises:
      CheckpointError: missing or unexpected tensors, or wrong shapes; all are listed.
    """
    if config.num_layers > len(source.tensors):  # before a list is made of what they would need
        raise CheckpointError(
            f"{where} has {len(source.tensors)} tensors, too few for the {config.num_layers} "
            "layers of its config. Check that config.json and the weights belong together."
        )
    wanted = {tensor.name: tensor.shape for tensor in hf_tensor_names(config).values()}
    if config.tie_embeddings and HEAD in source.tensors:
        wanted[HEAD] = wanted[EMBEDDING]
    found = {name: info.shape for name, info in source.tensors.items() if not is_buffer(name)}
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected: {name} {found[name]}" for name in found if name not in wanted]
    problems += [
        f"wrong shape: {name} is {found[name]}, its config asks for {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit its own config ({config.model_type}, {config.num_layers} layers,"
            f" width {config.hidden_size}):\n{listed(problems)}\n"
            "Check that config.json and the weights belong together."
        )


def listed(problems: list[str], most: int = 40) -> str:
    """Problems one to a line, and how many more there are beyond `most`."""
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more")
    return "\n".join(lines)
