"""LoRA adapters: made, attached, corrected, merged.

Adapters are a small tree of their own, {path: Adapter}: `attach(emulator, adapters)` trains,
`correct` makes them fit the original, `attach(params, adapters)` serves, `merge` ships.
"""

from emloc_jax.adapters._adapter import Adapter as Adapter
from emloc_jax.adapters._attach import attach as attach
from emloc_jax.adapters._attach import dropout_keys as dropout_keys
from emloc_jax.adapters._bound import Bound as Bound
from emloc_jax.adapters._bound import apply_bound as apply_bound
from emloc_jax.adapters._choose_limit import choose_limit as choose_limit
from emloc_jax.adapters._correct import correct as correct
from emloc_jax.adapters._init import init_adapters as init_adapters
from emloc_jax.adapters._merge import merge as merge
from emloc_jax.adapters._merge import merged_kernel as merged_kernel
from emloc_jax.adapters._report import CorrectionReport as CorrectionReport
from emloc_jax.adapters._report import KernelCorrection as KernelCorrection
from emloc_jax.adapters._report import correction_report as correction_report
from emloc_jax.adapters._terms import correction_terms as correction_terms
