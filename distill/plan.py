"""Will it fit, and how fast could it be: a plan before the bill, on any CPU host.

python -m distill.plan --config=configs/math_cl.py --topology=v5p:4x4x4

Compiles the run's own train step, prefill and decode loop ahead of time for TPUs (v5p:4x4x4,
v6e:8x8, v5e:16x16, ...) and for devices of this host (cpu:8), without loading weights; for GPUs
(gpu:h200x8) it estimates from shapes. Exit status: 0 it fits, 3 it does not, 2 the question makes
no sense.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from distill.base.errors import UserError
from distill.config import cli

DOES_NOT_FIT = 3


def plan(config: ConfigDict, topology_name: str, *, tries_others: bool = False):
    """The outlook of a run of `config` on a topology, printed.

    Args:
      config: as for a run.
      topology_name: see `topology.parse_topology`.
      tries_others: print the best meshes and microbatches instead; the first of them is returned.

    Raises:
      UserError: a run would refuse the config, or nothing is known of the topology or the models.
    """
    # Imported late: a wrong flag should not wait for JAX.
    from distill.base.topology import parse_topology
    from distill.build.plugins import import_plugins
    from distill.config.parse import parse_config
    from distill.planning import changes, report
    from distill.planning.outlook import compile_programs, estimate
    from distill.planning.subject import find_subject, fit_to_devices

    topology, parsed = parse_topology(topology_name), parse_config(config)
    if topology.platform != "gpu":
        topology.devices()  # before JAX looks for devices itself
    import_plugins(parsed)
    with tempfile.TemporaryDirectory() as workdir:
        subject = fit_to_devices(find_subject(parsed, Path(workdir)), topology.count)
        if tries_others:
            best, tried = changes.sweep(subject, topology)
            _say(report.sweep_lines(best, tried))
            return best[0]
        outlook = (estimate if topology.platform == "gpu" else compile_programs)(subject, topology)
        _say(report.lines(outlook))
        if not outlook.fits:
            _say(report.remedy_lines(changes.find_remedies(outlook)))
        return outlook


def dry_run(config: ConfigDict):
    """Prints the values that a run would have, and its outlook on the devices that are here.

    Nothing is started, compiled, downloaded or written. Returns the outlook.

    Raises:
      UserError: a run would refuse the config, or nothing is known of the devices or the models.
    """
    from distill.base.topology import topology_here
    from distill.build.devices import build_mesh
    from distill.build.plugins import import_plugins
    from distill.config.parse import parse_config, to_flat_dict
    from distill.planning import report
    from distill.planning.outlook import estimate
    from distill.planning.subject import find_subject, fit_to_devices

    parsed = parse_config(config)
    import_plugins(parsed)
    _say(report.setting_lines(to_flat_dict(parsed)))
    _say([""])
    topology = topology_here()
    build_mesh(parsed)  # refuses what a run would
    with tempfile.TemporaryDirectory() as workdir:
        subject = fit_to_devices(find_subject(parsed, Path(workdir)), topology.count)
    outlook = estimate(subject, topology)
    _say(report.lines(outlook))
    return outlook


def _say(lines) -> None:
    for line in lines:
        print(line, flush=True)


def main() -> None:
    config = cli.required_config(_CONFIG)
    if not _TOPOLOGY.value:
        raise UserError("pass --topology=NAME, e.g. v5p:4x4x4, v6e:8x8, gpu:h200x8 or cpu:8")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not plan(config, _TOPOLOGY.value, tries_others=_SWEEP.value).fits:
        sys.exit(DOES_NOT_FIT)


if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "What to plan for, such as v5p:4x4x4.")
    _SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and microbatches; print the best.")
    cli.run(main)
