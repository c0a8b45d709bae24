"""What the kernels are compiled for: the devices of the current mesh, else this machine's.

The mesh's may be described rather than present (ahead-of-time compiling).
"""

from __future__ import annotations

import jax


def platform() -> str:
    """'cpu', 'gpu' or 'tpu'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name


def device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind


def cuda_capability() -> float:
    """Of this machine's NVIDIA GPUs: 8 from Ampere on, 9 from Hopper on; 0 without one."""
    if jax.default_backend() != "gpu":
        return 0.0
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(capability) if capability.replace(".", "").isdigit() else 0.0  # AMD's are names


def is_old_tpu() -> bool:
    """Whether it is a TPU from before v5e: with too little fast memory, or nothing tried on it."""
    old = any(generation in device_kind() for generation in ("v2", "v3", "v4"))
    return platform() == "tpu" and old
