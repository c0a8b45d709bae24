"""The real compiler for TPUs, on any machine that has libtpu."""

import importlib.util

import pytest

from distill.base.mesh import make_mesh
from distill.base.topology import described_tpu

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is missing"
)


def tpu_mesh(topology, *sizes):
    devices = described_tpu(topology)[: sizes[0] * sizes[1] * sizes[2]]
    return make_mesh(*sizes, devices=devices)


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


def num_kernels(program):
    return program.as_text().count('custom_call_target="tpu_custom_call"')
