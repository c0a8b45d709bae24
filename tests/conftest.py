"""Eight CPU devices for every test; set before jax is first imported."""

import os

# Another platform only on request, for the tests that need a device: DISTILL_TEST_PLATFORM=cuda.
os.environ["JAX_PLATFORMS"] = os.environ.get("DISTILL_TEST_PLATFORM", "cpu")
# Hundreds of tiny programs are compiled and each runs for microseconds: no LLVM optimisation.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
