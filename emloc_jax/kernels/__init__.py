"""Boxed kernels: leaves of a parameter tree that stand for an array.

Boxes (`LowRankKernel`, `LoraKernel`, `TappedKernel`, `SubspaceKernel`) nest and work
in any linen module by unboxing; `intercept` computes with their factors; `find_kernels` asks a
model what it has.
"""

from emloc_jax.kernels._box import Box as Box
from emloc_jax.kernels._box import is_box as is_box
from emloc_jax.kernels._box import is_leaf as is_leaf
from emloc_jax.kernels._box import peel as peel
from emloc_jax.kernels._find import KernelSpec as KernelSpec
from emloc_jax.kernels._find import find_kernels as find_kernels
from emloc_jax.kernels._handle_conv import use_conv as use_conv
from emloc_jax.kernels._handle_dense import use_dense as use_dense
from emloc_jax.kernels._handle_dense import use_dense_general as use_dense_general
from emloc_jax.kernels._handle_einsum import use_einsum as use_einsum
from emloc_jax.kernels._handle_embed import use_attend as use_attend
from emloc_jax.kernels._handle_embed import use_lookup as use_lookup
from emloc_jax.kernels._handlers import Handler as Handler
from emloc_jax.kernels._handlers import register_handler as register_handler
from emloc_jax.kernels._intercept import intercept as intercept
from emloc_jax.kernels._layout import Layout as Layout
from emloc_jax.kernels._lora import LoraKernel as LoraKernel
from emloc_jax.kernels._lora import lora_scale as lora_scale
from emloc_jax.kernels._low_rank import LowRankKernel as LowRankKernel
from emloc_jax.kernels._low_rank import factor_product as factor_product
from emloc_jax.kernels._materialize import materialize as materialize
from emloc_jax.kernels._paths import flatten_leaves as flatten_leaves
from emloc_jax.kernels._paths import get_leaf as get_leaf
from emloc_jax.kernels._paths import set_leaves as set_leaves
from emloc_jax.kernels._product import KernelUse as KernelUse
from emloc_jax.kernels._projector import SparseProjector as SparseProjector
from emloc_jax.kernels._projector import cache as cache
from emloc_jax.kernels._projector import dense_projector as dense_projector
from emloc_jax.kernels._projector import identity_projector as identity_projector
from emloc_jax.kernels._projector import make_projector as make_projector
from emloc_jax.kernels._projector import stack_projectors as stack_projectors
from emloc_jax.kernels._projector import to_dense as to_dense
from emloc_jax.kernels._projector import uncache as uncache
from emloc_jax.kernels._projector import with_values as with_values
from emloc_jax.kernels._projector_choice import faster_products as faster_products
from emloc_jax.kernels._projector_products import cross as cross
from emloc_jax.kernels._projector_products import gram as gram
from emloc_jax.kernels._projector_products import lift as lift
from emloc_jax.kernels._projector_products import lift_matrix as lift_matrix
from emloc_jax.kernels._projector_products import lift_rows as lift_rows
from emloc_jax.kernels._projector_products import project as project
from emloc_jax.kernels._projector_products import project_matrix as project_matrix
from emloc_jax.kernels._rules import match_rules as match_rules
from emloc_jax.kernels._rules import select as select
from emloc_jax.kernels._subspace import SubspaceKernel as SubspaceKernel
from emloc_jax.kernels._tapped import TappedKernel as TappedKernel
