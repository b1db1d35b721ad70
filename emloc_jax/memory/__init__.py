"""The memory contract: what every stage of a run takes, before anything is allocated."""

from emloc_jax.memory._abstract_emulator import abstract_adapters as abstract_adapters
from emloc_jax.memory._abstract_emulator import abstract_emulator as abstract_emulator
from emloc_jax.memory._abstract_model import AbstractModel as AbstractModel
from emloc_jax.memory._abstract_model import abstract_model as abstract_model
from emloc_jax.memory._contract import nearest as nearest
from emloc_jax.memory._contract import require_fits as require_fits
from emloc_jax.memory._contract import smallest as smallest
from emloc_jax.memory._depends import depends_on as depends_on
from emloc_jax.memory._donation import assert_donated as assert_donated
from emloc_jax.memory._donation import donated_bytes as donated_bytes
from emloc_jax.memory._figure import check_figure as check_figure
from emloc_jax.memory._figure import draw_plan as draw_plan
from emloc_jax.memory._methods import methods as methods
from emloc_jax.memory._methods import register_method as register_method
from emloc_jax.memory._plan import Budget as Budget
from emloc_jax.memory._plan import Plan as Plan
from emloc_jax.memory._plan import Planner as Planner
from emloc_jax.memory._search import KNOBS as KNOBS
from emloc_jax.memory._search import largest as largest
from emloc_jax.memory._setting import Setting as Setting
from emloc_jax.memory._stage import Program as Program
from emloc_jax.memory._stage import Stage as Stage
from emloc_jax.memory._stage import StageMemory as StageMemory
from emloc_jax.memory._stage import measure_stage as measure_stage
from emloc_jax.memory._target import Target as Target
from emloc_jax.memory._target import target_named as target_named
