"""What the plan does: finds the models' shapes, fits them to devices, and prints the outlook."""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from distill.base.topology import parse_topology, topology_here
from distill.build.devices import build_mesh
from distill.build.plugins import import_plugins
from distill.config.parse import parse_config, to_flat_dict
from distill.planning import changes, report
from distill.planning.outlook import Outlook, compile_programs, estimate
from distill.planning.subject import find_subject, fit_to_devices


def plan(config: ConfigDict, topology_name: str, *, tries_others: bool = False) -> Outlook:
    """The outlook of a run of `config` on a topology, printed.

    Args:
      config: as for a run.
      topology_name: see `topology.parse_topology`.
      tries_others: print the best meshes and microbatches instead; the first of them is returned.

    Raises:
      UserError: a run would refuse the config, or nothing is known of the topology or the models.
    """
    topology, parsed = parse_topology(topology_name), parse_config(config)
    if topology.platform != "gpu":
        topology.devices()  # before JAX looks for devices itself
    import_plugins(parsed)
    subject = fit_to_devices(find_subject(parsed), topology.count)
    if tries_others:
        best, tried = changes.sweep(subject, topology)
        _say(report.sweep_lines(best, tried))
        return best[0]
    outlook = (estimate if topology.platform == "gpu" else compile_programs)(subject, topology)
    _say(report.lines(outlook))
    if not outlook.fits:
        _say(report.remedy_lines(changes.find_remedies(outlook)))
    return outlook


def dry_run(config: ConfigDict) -> Outlook:
    """Prints the values that a run would have, and its outlook on the devices that are here.

    Nothing is started, compiled, downloaded or written. Returns the outlook.

    Raises:
      UserError: a run would refuse the config, or nothing is known of the devices or the models.
    """
    parsed = parse_config(config)
    import_plugins(parsed)
    _say(report.setting_lines(to_flat_dict(parsed)))
    _say([""])
    topology = topology_here()
    build_mesh(parsed)  # refuses what a run would
    subject = fit_to_devices(find_subject(parsed), topology.count)
    outlook = estimate(subject, topology)
    _say(report.lines(outlook))
    return outlook


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
