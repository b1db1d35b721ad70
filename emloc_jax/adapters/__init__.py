"""LoRA adapters: made, attached, corrected, merged.

Adapters are a small tree of their own, {path: Adapter}: `attach(emulator, adapters)` trains,
`correct` makes them fit the original, `attach(params, adapters)` serves, `merge` ships. A parameter
that is trained whole, as a classifier's head, stands among them as a `Whole`.
"""

from emloc_jax.adapters._adapter import Adapter as Adapter
from emloc_jax.adapters._attach import attach as attach
from emloc_jax.adapters._attach import dropout_keys as dropout_keys
from emloc_jax.adapters._bound import Bound as Bound
from emloc_jax.adapters._bound import apply_bound as apply_bound
from emloc_jax.adapters._bound import check_limit as check_limit
from emloc_jax.adapters._choose_limit import CANDIDATES as CANDIDATES
from emloc_jax.adapters._choose_limit import best_limit as best_limit
from emloc_jax.adapters._choose_limit import choose_limit as choose_limit
from emloc_jax.adapters._choose_limit import limit_trials as limit_trials
from emloc_jax.adapters._choose_limit import limits_to_try as limits_to_try
from emloc_jax.adapters._choose_limit import trial_loss as trial_loss
from emloc_jax.adapters._correct import correct as correct
from emloc_jax.adapters._correct import correct_kernel as correct_kernel
from emloc_jax.adapters._fit import fitting_leaves as fitting_leaves
from emloc_jax.adapters._init import init_adapters as init_adapters
from emloc_jax.adapters._merge import merge as merge
from emloc_jax.adapters._merge import merged_kernel as merged_kernel
from emloc_jax.adapters._mismatch import mismatch as mismatch
from emloc_jax.adapters._problem import HasSum as HasSum
from emloc_jax.adapters._problem import Problem as Problem
from emloc_jax.adapters._problem import problems as problems
from emloc_jax.adapters._report import CorrectionReport as CorrectionReport
from emloc_jax.adapters._report import KernelCorrection as KernelCorrection
from emloc_jax.adapters._report import correction_report as correction_report
from emloc_jax.adapters._report import kernel_corrections as kernel_corrections
from emloc_jax.adapters._terms import correction_terms as correction_terms
from emloc_jax.adapters._whole import Trainable as Trainable
from emloc_jax.adapters._whole import Whole as Whole
from emloc_jax.adapters._whole import init_whole as init_whole
from emloc_jax.adapters._whole import lora_alone as lora_alone
from emloc_jax.adapters._whole import split_whole as split_whole
