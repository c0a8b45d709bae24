"""Workloads for the tests of plans."""

import dataclasses

import configs.math_cl
from distill.base.topology import parse_topology
from distill.config.parse import parse_config
from distill.planning.arrays import Arrays, make_arrays
from distill.planning.workload import Workload, find_workload, fit_to_devices


def flagship():
    return configs.math_cl.get_config()


def workload_of(config, topology: str) -> Workload:
    return fit_to_devices(find_workload(parse_config(config)), parse_topology(topology).count)


def workload_on_mesh(
    config, model, data: int, fsdp: int, tensor: int, context: int = 1
) -> Workload:
    """A model as its own teacher."""
    config = parse_config(config)
    mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor, context=context)
    config = dataclasses.replace(config, mesh=mesh)
    return fit_to_devices(Workload(config, model, (model,), 30), data * fsdp * tensor * context)


def arrays_of(workload: Workload) -> Arrays:
    return make_arrays(workload, workload.mesh, workload.sampler_mesh)
