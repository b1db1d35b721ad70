"""The memory contract: what a run takes, and what a machine offers."""

from emloc_jax.memory._ledger import Ledger as Ledger
from emloc_jax.memory._ledger import OpenStage as OpenStage
from emloc_jax.memory._ledger import StageFigures as StageFigures
from emloc_jax.memory._ledger_peak import Peak as Peak
from emloc_jax.memory._ledger_peak import Reading as Reading
from emloc_jax.memory._ledger_peak import peak_between as peak_between
