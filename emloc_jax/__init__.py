"""Fine-tune a model in the memory you already need to run it.

Calibrate and compress a Flax model into an emulator, train LoRA on the emulator, correct it, put it
back on the original. Stages, in order:

    find_kernels -> calibrate -> compress -> init_adapters, attach, intercept -> correct -> merge

Rooms: `kernels`, `models`, `emulator`, `adapters`, `offload`, `checkpoints`, `training`,
`memory`; the command line is `emloc`.
"""

from emloc_jax.adapters import Adapter as Adapter
from emloc_jax.adapters import attach as attach
from emloc_jax.adapters import choose_limit as choose_limit
from emloc_jax.adapters import correct as correct
from emloc_jax.adapters import correction_report as correction_report
from emloc_jax.adapters import init_adapters as init_adapters
from emloc_jax.adapters import merge as merge
from emloc_jax.checkpoints import load_adapter as load_adapter
from emloc_jax.checkpoints import load_emulator as load_emulator
from emloc_jax.checkpoints import load_pretrained as load_pretrained
from emloc_jax.checkpoints import save_adapter as save_adapter
from emloc_jax.checkpoints import save_emulator as save_emulator
from emloc_jax.checkpoints import save_pretrained as save_pretrained
from emloc_jax.emulator import CompactMoment as CompactMoment
from emloc_jax.emulator import CompressionReport as CompressionReport
from emloc_jax.emulator import SecondMoment as SecondMoment
from emloc_jax.emulator import calibrate as calibrate
from emloc_jax.emulator import compress as compress
from emloc_jax.kernels import KernelSpec as KernelSpec
from emloc_jax.kernels import Layout as Layout
from emloc_jax.kernels import LoraKernel as LoraKernel
from emloc_jax.kernels import LowRankKernel as LowRankKernel
from emloc_jax.kernels import TappedKernel as TappedKernel
from emloc_jax.kernels import find_kernels as find_kernels
from emloc_jax.kernels import intercept as intercept
from emloc_jax.kernels import materialize as materialize
from emloc_jax.kernels import register_handler as register_handler
