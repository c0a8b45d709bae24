"""Plans as users ask for them: printed."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from ml_collections import ConfigDict

from distill.base.topology import Topology, parse_topology, topology_here
from distill.build.plugins import import_plugins
from distill.build.run import check_loggers
from distill.build.session import Session
from distill.config.parse import parse_config, to_flat_dict
from distill.config.schema import Config
from distill.planning import changes, report
from distill.planning.estimate import Plan, compile_plan, estimate
from distill.planning.workload import Workload, find_workload, fit_to_devices


def plan(config: ConfigDict, topology_name: str) -> Plan:
    """The plan of a run of `config` on a topology, and what would help where it does not fit.

    Raises:
      UserError: a run would refuse the config, or nothing is known of the topology or the models.
    """
    workload, topology = _described(config, topology_name)
    made = (estimate if topology.platform == "gpu" else compile_plan)(workload, topology)
    _say(report.lines(made))
    if not made.fits and not made.is_refused:
        _say(report.remedy_lines(changes.find_remedies(made)))
    return made


def sweep(config: ConfigDict, topology_name: str) -> Plan:
    """The best of other meshes and microbatches, of which the best few are printed; see `plan`."""
    best, tried = changes.sweep(*_described(config, topology_name))
    _say(report.sweep_lines(best, tried))
    return best[0]


def dry_run(config: ConfigDict) -> Plan:
    """Prints the values that a run would have, its plan on the devices here, and its data.

    All but weights is built: data and tokenizers may be downloaded. Nothing is started or compiled.

    Raises:
      UserError: a run would refuse the config, or nothing is known of the devices or the models.
    """
    parsed = parse_config(config)
    import_plugins(parsed)
    _say([*report.setting_lines(to_flat_dict(parsed)), ""])
    session = Session(parsed, weights=False)
    check_loggers(parsed.logger)
    _ = session.objective, session.optimizer, session.sampler_mesh, session.dataset
    _ = session.validation
    topology = topology_here()
    made = estimate(_find(parsed, topology), topology)
    _say(report.lines(made))
    with jax.set_mesh(session.mesh):
        _ = session.state_shapes
    _say([f"data: {session.prompts.summary()}"])
    _ = session.reward, session.weighing
    if session.validation is not None:
        _say([f"validation data: {session.evaluator.prompts.summary()}"])
    return made


def _described(config: ConfigDict, topology_name: str) -> tuple[Workload, Topology]:
    topology, parsed = parse_topology(topology_name), parse_config(config)
    if topology.platform != "gpu":
        topology.devices()  # before JAX looks for devices itself
    import_plugins(parsed)
    return _find(parsed, topology), topology


def _find(config: Config, topology: Topology) -> Workload:
    return fit_to_devices(find_workload(config), topology.count)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
