"""Workspace that LAPACK takes beside a program on a CPU, which XLA's analysis does not count."""

import re

import jax

__all__ = ["lapack_workspace"]

_SYEVD = re.compile(r"@lapack_[sd]syevd_ffi\(.*?\} : \(tensor<([0-9x]+)xf(32|64)>")


def lapack_workspace(lowered: jax.stages.Lowered) -> int:
    """Bytes that the largest symmetric eigendecomposition of a program asks LAPACK's caller for.

    `syevd` with vectors takes 1 + 6 n + 2 n² numbers and 3 + 5 n integers (LAPACK Users' Guide).
    Other routines that the library calls take a few rows. Zero where a program has none, or is not
    for a CPU.

    Example:
      >>> import jax.numpy as jnp
      >>> lapack_workspace(jax.jit(jnp.linalg.eigh).lower(jnp.zeros((2, 100, 100))))
      84416
    """
    sizes = [0]
    for shape, bits in _SYEVD.findall(lowered.as_text()):
        n = int(shape.split("x")[-1])
        sizes.append(int(bits) // 8 * (1 + 6 * n + 2 * n * n) + 4 * (3 + 5 * n))
    return max(sizes)
