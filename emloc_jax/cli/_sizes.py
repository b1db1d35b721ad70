"""Bytes asked of compiled programs."""

from typing import Any

import jax

from emloc_jax._bytes import format_bytes, parse_bytes

__all__ = ["format_bytes", "inference_memory", "parse_bytes", "peak", "step_memory"]


def peak(compiled: Any) -> int:
    """Peak bytes of a compiled program: arguments, outputs and temporaries, donations once."""
    analysis = compiled.memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def step_memory(step: Any, state: Any, frozen: Any, batch: Any) -> int:
    """Peak bytes of a training step, from XLA's analysis of the compiled program."""
    return peak(step.lower(state, frozen, batch).compile())


def inference_memory(forward: Any, params: Any, batch: Any) -> int:
    """Peak bytes of `forward(params, batch)`, at the batch's shape."""
    return peak(jax.jit(forward).lower(params, batch).compile())
