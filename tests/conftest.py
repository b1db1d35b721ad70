"""What must be set before jax starts its backend.

Four host devices serve the sharding tests. Compiling is most of the suite's time, and the tests'
programs are tiny, so LLVM's optimizations are left out; XLA's own (fusion, memory) stay on. What
one test has compiled, others of the same run find in a folder that all workers share.
"""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4"
    + " --xla_backend_optimization_level=0"
).strip()
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA has the cores; two pools thrash
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit what their parent has set
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="emloc_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
