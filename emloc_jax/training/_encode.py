"""Rows as token arrays with completion-only loss weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from emloc_jax.errors import ConfigError, DataError
from emloc_jax.training._chat import Piece, is_chat, prompt_text, row_pieces
from emloc_jax.training._rows import Row

__all__ = ["Example", "Expand", "encode_rows", "prompt_tokens"]

logger = logging.getLogger(__name__)

# From a row and the texts of its pieces to the texts that are tokenised.
Expand = Callable[[Row, Sequence[str]], list[str]]


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised row, shifted already: position i sees tokens[:i + 1], predicts targets[i].

    Attributes:
        tokens: (n,) int32 inputs.
        targets: (n,) int32 next tokens.
        weights: (n,) float32, 1 where the target is learnt and 0 elsewhere.
        origin: where the row stands.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    origin: str


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int,
    chat: bool = False,
    system: str | None = None,
    truncate: Literal["left", "right"] | None = None,
    expand: Expand | None = None,
) -> list[Example]:
    """Tokenise rows so that only completions (assistant turns) are learnt.

    A completion ends with the tokenizer's end token, or with the closing token of the chat
    template; what the template puts after that token is not learnt. A prompt is tokenised as at
    generation, on its own.

    Args:
        rows: the rows.
        tokenizer: a Hugging Face tokenizer.
        max_length: largest number of input tokens, the model's context.
        chat: whether `prompt` and `completion` are wrapped by the chat template; `messages`
            always are.
        system: system turn for chats that have none.
        truncate: what to do with a longer row: `None` refuses it, `'left'` drops the oldest
            tokens before the last completion, `'right'` drops the end.
        expand: changes the texts of a row before they are tokenised: puts in its image tokens, say.

    Raises:
        DataError: a row does not fit (the message names it), or has no token to learn.
        ConfigError: an impossible option.

    Example:
        >>> class Letters:  # stands for a Hugging Face tokenizer
        ...     eos_token_id, bos_token_id, all_special_ids = 0, None, [0]
        ...
        ...     def __call__(self, text, **_):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> (example,) = encode_rows([Row("row 1", "1+1=", "2")], Letters(), max_length=8)
        >>> example.targets.tolist(), example.weights.tolist()
        ([43, 49, 61, 50, 0], [0.0, 0.0, 0.0, 1.0, 1.0])
    """
    if max_length < 1 or truncate not in (None, "left", "right"):
        raise ConfigError(
            f"max_length is {max_length} and truncate {truncate!r}; max_length must be positive "
            "and truncate None, 'left' or 'right'."
        )
    examples, cut = [], 0
    for row in rows:
        pieces = row_pieces(row, tokenizer, chat=chat, system=system)
        if expand is not None:
            texts, learnt = zip(*pieces, strict=True)
            pieces = list(zip(expand(row, texts), learnt, strict=True))
        tokens, learnt = _tokens(pieces, tokenizer, template=is_chat(row, chat), origin=row.origin)
        if len(tokens) - 1 > max_length:
            tokens, learnt = _truncate(tokens, learnt, max_length, truncate, row.origin)
            cut += 1
        if not learnt[1:].any():
            raise DataError(
                f"{row.origin}: nothing precedes the only completion token; give the row a prompt."
            )
        examples.append(Example(tokens[:-1], tokens[1:], learnt[1:].astype(np.float32), row.origin))
    logger.info("%d rows tokenised, %d truncated to %d tokens", len(examples), cut, max_length)
    return examples


def prompt_tokens(
    row: Row,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    chat: bool = False,
    system: str | None = None,
    expand: Expand | None = None,
) -> list[int]:
    """Token ids from which a model answers `row`; the very ones its training row begins with.

    Raises:
        DataError: the prompt is longer than `max_length`.
    """
    text = prompt_text(row, tokenizer, chat=chat, system=system)
    if expand is not None:
        (text,) = expand(row, [text])
    ids = [] if is_chat(row, chat) else _begin(tokenizer)
    ids = ids + _ids(tokenizer, text)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"{row.origin}: the prompt has {len(ids)} tokens, the context holds {max_length}."
        )
    return ids


def _tokens(
    pieces: list[Piece], tokenizer: Any, *, template: bool, origin: str
) -> tuple[np.ndarray, np.ndarray]:
    special = _special_ids(tokenizer)
    ids = [] if template else _begin(tokenizer)
    first = len(ids)
    learnt = [False] * first
    text = ""
    for piece, is_learnt in pieces:
        text += piece
        whole = _ids(tokenizer, text)
        # A tokenizer may treat a text's beginning specially (SentencePiece), so a piece is
        # tokenised behind what precedes it; but tokens never merge across the boundary, for at
        # generation the prompt stands alone.
        begins = whole[: len(ids) - first] == ids[first:]
        new = whole[len(ids) - first :] if begins else _ids(tokenizer, piece)
        ids += new
        closing = [i for i, t in enumerate(new) if t in special] if template else []
        last = closing[-1] if closing else len(new) - 1
        learnt += [is_learnt and i <= last for i in range(len(new))]
        if is_learnt and not closing:
            end = tokenizer.eos_token_id
            if end is None:
                raise DataError(f"{origin}: the tokenizer has no end token to close a completion.")
            if not new or new[-1] != end:
                ids.append(end)
                learnt.append(True)
    end = len(learnt) - learnt[::-1].index(True)  # what follows the last answer teaches nothing
    return np.asarray(ids[:end], np.int32), np.asarray(learnt[:end], bool)


def _truncate(
    tokens: np.ndarray, learnt: np.ndarray, limit: int, side: str | None, origin: str
) -> tuple[np.ndarray, np.ndarray]:
    excess = len(tokens) - 1 - limit
    prompt = int(np.argmax(learnt))
    if side is None:
        what = "the prompt" if prompt > limit else "the row"
        count = prompt if prompt > limit else len(tokens) - 1
        raise DataError(
            f"{origin}: {what} has {count} tokens, the context holds {limit}; shorten it, or ask "
            "for truncation ('left' or 'right')."
        )
    if side == "right":
        tokens, learnt = tokens[: limit + 1], learnt[: limit + 1]
        left = learnt[1:].any()
    else:
        given = np.flatnonzero(~learnt)
        left = given.size > 0 and excess <= given[-1]  # the last answer keeps a token before it
        tokens, learnt = tokens[excess:], learnt[excess:]
    if not left:
        raise DataError(
            f"{origin}: truncating the row ({side}) to {limit} tokens would cut away the prompt or "
            "the completion; shorten the row."
        )
    return tokens, learnt


def _ids(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _begin(tokenizer: Any) -> list[int]:
    """The begin token, if this tokenizer puts one before a text."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
