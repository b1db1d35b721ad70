"""The memory contract: what a run takes, and what a machine offers."""

from emloc_jax.memory._doctor_advice import advise as advise
from emloc_jax.memory._doctor_facts import DeviceFacts as DeviceFacts
from emloc_jax.memory._doctor_facts import HostFacts as HostFacts
from emloc_jax.memory._doctor_facts import JaxFacts as JaxFacts
from emloc_jax.memory._doctor_facts import MachineFacts as MachineFacts
from emloc_jax.memory._doctor_facts import PlaceFacts as PlaceFacts
from emloc_jax.memory._doctor_hazard import Advice as Advice
from emloc_jax.memory._doctor_rates import LinkRates as LinkRates
from emloc_jax.memory._doctor_rates import ProductRate as ProductRate
from emloc_jax.memory._doctor_rates import Rates as Rates
from emloc_jax.memory._ledger import Ledger as Ledger
from emloc_jax.memory._ledger import OpenStage as OpenStage
from emloc_jax.memory._ledger import StageFigures as StageFigures
from emloc_jax.memory._ledger_peak import Peak as Peak
from emloc_jax.memory._ledger_peak import Reading as Reading
from emloc_jax.memory._ledger_peak import peak_between as peak_between
from emloc_jax.memory._probes import examine as examine
