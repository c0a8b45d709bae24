"""Accelerators by name: what a chip can do, and its devices, which need not be present.

A topology is written v5p:4x4x4 (TPUs by their slice), cpu:8 (devices of this host) or gpu:h200x8.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
import timeit
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from distill.base.errors import UserError

# A libtpu by itself would be the newest, which may not fit this JAX.
INSTALL_COMPILER = f'pip install "jax[tpu]=={jax.__version__}"'


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at best.

    Attributes:
      memory: bytes, as the maker gives them.
      flops: bfloat16 operations per second, dense.
      bandwidth: bytes per second to and from the device's memory.
      network: bytes per second that a device can send, and receive, over all its links.
      source: where the numbers stand.
      node: devices that these links join; 0: all of a slice.
      across: bytes per second and device that leave the node.
      per_chip: devices of one chip.
    """

    memory: float
    flops: float
    bandwidth: float
    network: float
    source: str
    node: int = 0
    across: float = 0.0
    per_chip: int = 1


# Google gives links in both directions together, NVIDIA too: half of it is what a device sends.
# Across nodes, NVIDIA's own systems have one adapter per GPU: 400 Gb/s, of the A100 200 Gb/s.
_TPU_SOURCE = "docs.cloud.google.com/tpu/docs/"
_GPU_SOURCE = "NVIDIA's data sheet of the "
CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9, 200e9, _TPU_SOURCE + "v5e"),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9, _TPU_SOURCE + "v5p"),
    "v6e": Chip(32e9, 918e12, 1638e9, 400e9, _TPU_SOURCE + "v6e"),
    # Each of its chip's two devices has half of what the chip has.
    "tpu7x": Chip(96 * 2**30, 1153.5e12, 3690e9, 300e9, _TPU_SOURCE + "tpu7x", per_chip=2),
}
GPUS = {
    "a100": Chip(80e9, 312e12, 2.039e12, 300e9, _GPU_SOURCE + "A100 SXM 80 GB", 8, 25e9),
    "h100": Chip(80e9, 989e12, 3.35e12, 450e9, _GPU_SOURCE + "H100 SXM", 8, 50e9),
    "h200": Chip(141e9, 989e12, 4.8e12, 450e9, _GPU_SOURCE + "H200 SXM", 8, 50e9),
    "b200": Chip(180e9, 2250e12, 8e12, 900e9, _GPU_SOURCE + "HGX B200", 8, 50e9),
}
# By a part of what JAX calls a device's kind; "TPU v5" would be found in "TPU v5 lite", too.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "A100": "a100",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
}
# The usual slices, by size.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices by name: the name as it was asked for, 'tpu', 'cpu' or 'gpu', and their chip."""

    name: str
    platform: str
    kind: str
    count: int

    @property
    def chip(self) -> Chip:
        """Of a CPU, measured here and divided by the devices that share it."""
        if self.platform == "cpu":
            return measured_cpu(self.count)
        return (CHIPS if self.platform == "tpu" else GPUS)[self.kind]

    @property
    def network(self) -> float:
        """Bytes per second that every device can send at once, at best."""
        chip = self.chip
        if not chip.node or self.count <= chip.node:
            return chip.network
        return min(chip.network, chip.node * chip.across)

    def devices(self) -> Sequence[jax.Device]:
        """To compile for; UserError for GPUs, whose compiler is not here."""
        if self.platform == "tpu":
            return described_tpu(f"{self.kind}:{self.name.partition(':')[2]}")
        if self.platform == "cpu":
            return host_devices(self.count)
        raise UserError(
            f"{self.name}: programs for GPUs can only be compiled on a machine that has one"
        )


def parse_topology(name: str) -> Topology:
    """What a topology's name means.

    Raises:
      UserError: it means nothing; the message lists what does.
    """
    kind, colon, size = name.partition(":")
    if kind in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", size):
        chips = math.prod(int(each) for each in size.split("x"))
        return Topology(name, "tpu", kind, chips * CHIPS[kind].per_chip)
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", size):
        return Topology(name, "cpu", "cpu", int(size))
    gpu, _, count = size.rpartition("x")
    if kind == "gpu" and gpu in GPUS and re.fullmatch(r"[1-9]\d{0,4}", count):
        return Topology(name, "gpu", gpu, int(count))
    raise UserError(
        f"unknown topology {name!r}: known are {', '.join(f'{tpu}:AxB' for tpu in CHIPS)} "
        "(v5p, tpu7x: AxBxC) for TPU slices such as v5p:4x4x4, v6e:8x8 or v5e:16x16, cpu:N for N "
        f"devices of this host, and {', '.join(f'gpu:{gpu}xN' for gpu in GPUS)}"
    )


def topology_here() -> Topology:
    """The devices that JAX has.

    Raises:
      UserError: nothing is known of their kind.
    """
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    if devices[0].platform == "cpu":
        return Topology(f"cpu:{count}", "cpu", "cpu", count)
    for word, chip in _KINDS.items():
        if word in kind and "40GB" not in kind:  # the smaller A100, half of what is known
            platform = "tpu" if chip in CHIPS else "gpu"
            return Topology(f"{kind}, {count} here", platform, chip, count)
    raise UserError(
        f"nothing is known of what a {kind} can do: plan with python -m distill.plan for one of "
        f"{', '.join((*CHIPS, *GPUS))}"
    )


def described_tpu(topology: str) -> Sequence[jax.Device]:
    """Devices of a TPU slice that need not be present, such as 'v6e:2x2', to compile for.

    Raises:
      UserError: the TPU compiler is missing, or there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the TPU compiler is missing, which needs no TPU: {INSTALL_COMPILER}")
    # libtpu asks the machine what it is, slowly and with warnings, unless it is told; and it takes
    # a lock on the chips, which are not used here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jaxlib has several classes for it
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"there is no TPU slice {topology} ({reason}): slices are such as v5e:4x4, v5e:16x16, "
            "v6e:8x8, v5p:4x4x4 or tpu7x:2x2x1"
        ) from None


def host_devices(count: int) -> Sequence[jax.Device]:
    """The first `count` devices of this host's CPU, which is divided into as many if need be.

    Raises:
      UserError: JAX has been started with fewer.
    """
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # JAX has looked for its devices before
            pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"cpu:{count} asks for {count} devices, and JAX was started with {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


@functools.cache
def measured_cpu(count: int) -> Chip:
    """This host as `count` devices that share it: memory, float32 products, copies."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    factor, text = np.ones((1536, 1536), np.float32), np.ones(1 << 27, np.uint8)
    flops = 2 * len(factor) ** 3 / _best_seconds(lambda: factor @ factor)
    bandwidth = 2 * text.nbytes / _best_seconds(text.copy)
    return Chip(
        memory / count,
        flops / count,
        bandwidth / count,
        bandwidth / count,
        source="measured on this host, which the devices share",
    )


def _best_seconds(run: Callable[[], object]) -> float:
    return min(timeit.repeat(run, number=1, repeat=4))
