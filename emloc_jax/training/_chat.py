"""The text of a row in pieces, each given or learnt, plainly or through a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emloc_jax.errors import DataError
from emloc_jax.training._rows import Row

__all__ = ["prompt_text", "row_pieces"]

Piece = tuple[str, bool]  # text, and whether it is learnt


def row_pieces(row: Row, tokenizer: Any, *, chat: bool, system: str | None) -> list[Piece]:
    """Pieces whose concatenation is the whole text of `row`; assistant turns are learnt.

    Args:
        row: the row.
        tokenizer: a Hugging Face tokenizer; its chat template is used for chats.
        chat: whether `prompt` and `completion` are wrapped as a user and an assistant turn.
        system: system turn put before a row that has none.

    Raises:
        DataError: the template is missing, refuses the turns, or rewrites earlier turns.
    """
    messages = _messages(row, chat=chat, system=system)
    if messages is None:
        return [(row.prompt or "", False), (row.completion or "", True)]
    pieces, done = [], ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _render(row, tokenizer, messages[:turn], opened=True)
        end = _render(row, tokenizer, messages[: turn + 1], opened=False)
        if not (start.startswith(done) and end.startswith(start)):
            raise DataError(
                f"{row.origin}: the chat template renders turn {turn + 1} in another way once a "
                "later turn follows, so its tokens cannot be told apart; make one row per "
                "assistant turn."
            )
        pieces += [(start[len(done) :], False), (end[len(start) :], True)]
        done = end
    return pieces


def prompt_text(
    row: Row, tokenizer: Any = None, *, chat: bool = False, system: str | None = None
) -> str:
    """The text from which a model answers `row`: the prompt, or the chat up to its last answer.

    Args:
        row: the row.
        tokenizer: a Hugging Face tokenizer with a chat template; not needed for a plain prompt.
        chat: whether `prompt` is wrapped as a user turn.
        system: system turn put before a row that has none.

    Raises:
        DataError: the template is missing or refuses the turns.

    Example:
        >>> prompt_text(Row("row 1", prompt="1 + 1 =", completion=" 2"))
        '1 + 1 ='
    """
    messages = _messages(row, chat=chat, system=system)
    if messages is None:
        return row.prompt or ""
    last = max(turn for turn, m in enumerate(messages) if m["role"] == "assistant")
    return _render(row, tokenizer, messages[:last], opened=True)


def is_chat(row: Row, chat: bool) -> bool:
    """Whether the text of `row` comes from the chat template."""
    return chat or row.messages is not None


def _messages(row: Row, *, chat: bool, system: str | None) -> list[Mapping[str, Any]] | None:
    if not is_chat(row, chat):
        return None
    if row.messages is not None:
        messages: list[Mapping[str, Any]] = list(row.messages)
    else:
        messages = [
            {"role": "user", "content": row.prompt},
            {"role": "assistant", "content": row.completion},
        ]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _render(row: Row, tokenizer: Any, messages: Sequence[Mapping], *, opened: bool) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{row.origin}: a chat needs a tokenizer with a chat template, and this one has none; "
            "use prompt and completion without chat."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opened
        )
    except Exception as error:  # whatever the template raises, by jinja or by its own rules
        raise DataError(f"{row.origin}: the chat template refuses the turns ({error}).") from error
