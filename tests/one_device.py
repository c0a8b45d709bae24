"""XLA's flags for commands that tests start on one device, as users have it."""

from importlib.metadata import version

# Programs run for moments: LLVM optimises nothing, and the older emitter of fusions, which is gone
# since, takes a third of the time. It rounds otherwise: not for tests that compare bits.
QUICK_XLA_FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK_XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
