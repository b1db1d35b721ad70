"""Chat messages to token ids, by the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emloc_jax.errors import DataError

__all__ = ["encode_chat"]


def encode_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, reply_next: bool = True
) -> list[int]:
    """Token ids of a conversation, as the model was trained to read it.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        messages: dicts with ``role`` and ``content``.
        reply_next: end with the opening of the assistant's reply, ready for ``generate``.

    Returns:
        The ids.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"A chat was to be encoded, but the tokenizer {type(tokenizer).__name__} has no chat "
            "template. Use the tokenizer of an instruction-tuned model, or pass plain text."
        )
    import jinja2  # every tokenizer with a template needs it anyway

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=reply_next,
            tokenize=False,
        )
    except jinja2.TemplateError as error:
        raise DataError(
            f"The chat template of the tokenizer refuses these {len(messages)} messages: {error}. "
            "Give roles and contents that the model knows."
        ) from error
    # The template writes every special token itself.
    return tokenizer.encode(text, add_special_tokens=False)
