"""What must be set before jax starts its backend.

Four host devices serve the sharding tests. Compiling is most of the suite's time, and the tests'
programs are tiny, so LLVM's optimizations are left out; XLA's own (fusion, memory) stay on.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4"
    + " --xla_backend_optimization_level=0"
).strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA has the cores; two pools thrash
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
