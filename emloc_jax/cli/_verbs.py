"""Single stages as commands; each reads folders and writes a new one."""

from emloc_jax.cli._verbs_build import run_correct, run_emulate
from emloc_jax.cli._verbs_run import run_eval, run_generate
from emloc_jax.cli._verbs_write import run_export, run_merge

__all__ = ["run_correct", "run_emulate", "run_eval", "run_export", "run_generate", "run_merge"]
