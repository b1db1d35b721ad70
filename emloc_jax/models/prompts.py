"""Prompts of different length as one left-padded batch, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from emloc_jax.errors import DataError

__all__ = ["check_prompts", "pad_prompts"]


def check_prompts(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuses prompts that the model cannot continue.

    Args:
        config: of the model.
        prompts: token ids.
        max_new_tokens: how many tokens are to follow each.

    Raises:
        DataError: an empty prompt, a token outside the vocabulary, or a prompt that does not fit
            the context together with what is to follow.
    """
    context = config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"Prompt {index} has no tokens. Begin it with at least one.")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise DataError(
                f"Prompt {index} holds token ids from {min(prompt)} to {max(prompt)}, but the "
                f"vocabulary is 0 to {config.vocab_size - 1}. Use the model's own tokenizer."
            )
        if len(prompt) + max_new_tokens > context:
            raise DataError(
                f"Prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones were asked "
                f"for, but the context holds {context}. Shorten the prompt or ask for fewer."
            )


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, rows: int, pad_to: int
) -> tuple[np.ndarray, np.ndarray]:
    """One batch of prompts, each at the right end of its row.

    Args:
        prompts: token ids, at most ``rows`` of them, none empty.
        rows: B; rows without a prompt are all padding.
        pad_to: the length is rounded up to a multiple of it, so that few shapes are compiled.

    Returns:
        (tokens (B, T) int32, positions (B, T) int32 with -1 for padding).

    Example:
        >>> from emloc_jax.models.prompts import pad_prompts
        >>> tokens, positions = pad_prompts([[7, 8], [9]], rows=2, pad_to=4)
        >>> tokens.tolist(), positions.tolist()
        ([[0, 0, 7, 8], [0, 0, 0, 9]], [[-1, -1, 0, 1], [-1, -1, -1, 0]])
    """
    length = -(-max(len(prompt) for prompt in prompts) // pad_to) * pad_to
    tokens = np.zeros((rows, length), np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        positions[row, length - len(prompt) :] = np.arange(len(prompt))
    return tokens, positions
