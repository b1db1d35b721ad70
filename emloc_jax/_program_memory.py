"""Memory of one compiled program, by XLA's own analysis."""

from typing import Any, NamedTuple

import jax

__all__ = ["ProgramMemory", "analysed"]


class ProgramMemory(NamedTuple):
    """Bytes of one compiled program, by XLA's own analysis.

    Attributes:
      arguments: what it is given, parameters among it.
      outputs: what it returns.
      temporaries: what it needs in between.
      aliased: outputs that take the place of donated arguments.

    Example:
      >>> memory = ProgramMemory(arguments=10, outputs=4, temporaries=3, aliased=4)
      >>> memory.added, memory.peak
      (3, 13)
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def added(self) -> int:
        """Bytes beyond what was there before."""
        return self.outputs + self.temporaries - self.aliased

    @property
    def peak(self) -> int:
        """Bytes while it runs: arguments, outputs and temporaries, donations once."""
        return self.arguments + self.added


def analysed(program: jax.stages.Lowered | jax.stages.Compiled) -> ProgramMemory:
    """Figures of a program, which is compiled if it is not yet; nothing of it is allocated.

    Example:
      >>> import jax.numpy as jnp
      >>> double = jax.jit(lambda x: 2 * x, donate_argnums=0)
      >>> memory = analysed(double.lower(jax.ShapeDtypeStruct((2**40,), jnp.float32)))
      >>> memory.peak // 2**40
      4
    """
    compiled: Any = program.compile() if isinstance(program, jax.stages.Lowered) else program
    analysis = compiled.memory_analysis()
    return ProgramMemory(
        int(analysis.argument_size_in_bytes),
        int(analysis.output_size_in_bytes),
        int(analysis.temp_size_in_bytes),
        int(analysis.alias_size_in_bytes),
    )
