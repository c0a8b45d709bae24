"""XLA's flags of the tests, and of commands that they start."""

from importlib.metadata import version

# Hundreds of tiny programs run for microseconds: LLVM optimises nothing, and the older emitter of
# fusions, which is gone since, takes half or a third of the time to compile. It rounds otherwise
# than the newer one, which users have: tests on the newest JAX and whole commands run that.
QUICK_XLA_FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK_XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
