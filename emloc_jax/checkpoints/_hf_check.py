"""Whether a checkpoint holds exactly the tensors its config asks for; nothing is read for that."""

from typing import Any, NamedTuple

from emloc_jax.checkpoints._source import WeightSource
from emloc_jax.checkpoints._stored_names import stored_names
from emloc_jax.errors import CheckpointError
from emloc_jax.models import HfStorage, hf_storage, is_buffer, layer_depths

__all__ = ["Stored", "check_tensors", "listed"]


class Stored(NamedTuple):
    """Where a checkpoint has what a model needs.

    Attributes:
      names: a tensor's Hugging Face name -> its name in the checkpoint.
      copies: name of a tensor in the checkpoint -> name there of the one it must repeat.
      fresh: paths of parameters that the checkpoint lacks and that are to be made afresh.
      unused: names of other heads' tensors, which the model has no use for.
    """

    names: dict[str, str]
    copies: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def check_tensors(
    source: WeightSource, config: Any, where: str, *, fresh_head: bool = False
) -> Stored:
    """Compare names and shapes of the checkpoint with the model's, and report every difference.

    Tensors that no parameter stands for are let pass if they are buffers that early
    `transformers` stored, copies of tied tensors (`read_params` checks that they are), or heads
    of other models of the same family.

    Args:
      source: an open checkpoint.
      config: what `config.json` describes.
      where: the checkpoint's place, for the message.
      fresh_head: the parts of a head that are wholly missing are to be made afresh.

    Raises:
      CheckpointError: missing or unexpected tensors, or wrong shapes; all are listed.
    """
    layers = sum(layer_depths(config).values())
    if layers > len(source.tensors):  # before a list is made of what they would need
        raise CheckpointError(
            f"{where} has {len(source.tensors)} tensors, too few for the {layers} "
            "layers of its config. Check that config.json and the weights belong together."
        )
    storage = hf_storage(config)
    found = {name: info.shape for name, info in source.tensors.items() if not is_buffer(name)}
    names = stored_names(found, storage)
    copies = {copy: names.get(of, of) for copy, of in storage.copies.items() if copy in found}
    missing_heads = _missing_heads(storage, names)
    wanted = {
        path: tensor
        for path, tensor in storage.tensors.items()
        if not (fresh_head and path.split("/")[0] in missing_heads)
    }
    shapes = {names.get(tensor.name, tensor.name): tensor.shape for tensor in wanted.values()}
    shapes |= {copy: shapes[of] for copy, of in copies.items()}
    extra = [name for name in found if name not in shapes]
    unused = [name for name in extra if storage.others and storage.others.fullmatch(name)]
    problems = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in found]
    problems += [f"unexpected: {name} {found[name]}" for name in extra if name not in unused]
    problems += [
        f"wrong shape: {name} is {found[name]}, its config asks for {shape}"
        for name, shape in shapes.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        advice = "Check that config.json and the weights belong together."
        if missing_heads and not fresh_head:
            advice += (
                f" To make the missing {' and '.join(missing_heads)} afresh, say how many labels "
                "there are: load_pretrained(..., num_labels=…)."
            )
        raise CheckpointError(
            f"{where} does not fit its own config ({config.model_type}, {layers} layers,"
            f" width {config.hidden_size}):\n{listed(problems)}\n{advice}"
        )
    fresh = tuple(path for path in storage.tensors if path not in wanted)
    return Stored(names, copies, fresh, tuple(unused))


def listed(problems: list[str], most: int = 40) -> str:
    """Problems one to a line, and how many more there are beyond `most`."""
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  … and {len(problems) - most} more")
    return "\n".join(lines)


def _missing_heads(storage: HfStorage, names: dict[str, str]) -> list[str]:
    """Parts of the head of which no tensor at all is there."""
    there = {path.split("/")[0] for path, t in storage.tensors.items() if t.name in names}
    return [head for head in storage.heads if head not in there]
