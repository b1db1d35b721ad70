"""Emulators: second moments, factorizations, ranks and the compressed parameter tree.

`calibrate` measures, `compress` builds. In two steps, `factorize_kernels` keeps whole spectra and
`truncate` cuts them to any ranks. `factorize` is the numeric core, on arrays. What a build that
holds a block at a time needs of these is here too: `Taps`, `candidates`, `kernel_report`.
"""

from emloc_jax.emulator._allocate import allocate as allocate
from emloc_jax.emulator._allocate import ranks_for_rules as ranks_for_rules
from emloc_jax.emulator._budget import Share as Share
from emloc_jax.emulator._budget import ranks_for_budget as ranks_for_budget
from emloc_jax.emulator._calibrate import any_scalar as any_scalar
from emloc_jax.emulator._calibrate import calibrate as calibrate
from emloc_jax.emulator._calibrate import calibration_step as calibration_step
from emloc_jax.emulator._compress import compress as compress
from emloc_jax.emulator._entries import error_squares as error_squares
from emloc_jax.emulator._entries import kernel_report as kernel_report
from emloc_jax.emulator._factorization import Factorization as Factorization
from emloc_jax.emulator._factorizations_file import load_factorizations as load_factorizations
from emloc_jax.emulator._factorizations_file import save_factorizations as save_factorizations
from emloc_jax.emulator._factorize import factorize as factorize
from emloc_jax.emulator._factorize_kernels import choose_weighting as choose_weighting
from emloc_jax.emulator._factorize_kernels import factorize_kernels as factorize_kernels
from emloc_jax.emulator._moment_forms import MomentForm as MomentForm
from emloc_jax.emulator._moment_forms import compact_sides as compact_sides
from emloc_jax.emulator._moments import CompactMoment as CompactMoment
from emloc_jax.emulator._moments import SecondMoment as SecondMoment
from emloc_jax.emulator._moments import merge_moments as merge_moments
from emloc_jax.emulator._moments import moment_arrays as moment_arrays
from emloc_jax.emulator._moments import moment_of_arrays as moment_of_arrays
from emloc_jax.emulator._moments_file import load_moments as load_moments
from emloc_jax.emulator._moments_file import save_moments as save_moments
from emloc_jax.emulator._ranks import break_even_rank as break_even_rank
from emloc_jax.emulator._ranks import rank_for_energy as rank_for_energy
from emloc_jax.emulator._ranks import rank_for_ratio as rank_for_ratio
from emloc_jax.emulator._report import CompressionReport as CompressionReport
from emloc_jax.emulator._report import KernelReport as KernelReport
from emloc_jax.emulator._selection import candidates as candidates
from emloc_jax.emulator._taps import Sums as Sums
from emloc_jax.emulator._taps import Taps as Taps
from emloc_jax.emulator._truncate import truncate as truncate
