"""Workloads for the tests of plans."""

import dataclasses
import math

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
    config, model, data: int, fsdp: int, tensor: int, context: int = 1, expert: int = 1
) -> Workload:
    """A model as its own teacher."""
    config = parse_config(config)
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    workload = Workload(config, model, (model,), 30)
    return fit_to_devices(workload, math.prod(sizes.values()))


def arrays_of(workload: Workload) -> Arrays:
    return make_arrays(workload, workload.mesh, workload.sampler_mesh)
