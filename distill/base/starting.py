"""How this process was started, and with which others: by flags, or as the environment says."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from typing import Any

from distill.base.errors import UserError

_SLURM_INTERACTIVE_STEP = str(0xFFFFFFFA)  # SLURM_INTERACTIVE_STEP of slurm/slurm.h


# Where process 0 listens, how many there are, and this one's number and devices; None: all.
Others = tuple[str, int, int, Any]


def find_others(
    address: str | None, count: int | None, number: int | None, timeout: int
) -> Others | None:
    """The processes of the run, by JAX's own search for what is not given; None: this one is alone.

    `timeout`: seconds for that search.

    Raises:
      UserError: the arguments contradict each other, or there are others that are not found.
    """
    given = dict(coordinator_address=address, num_processes=count, process_id=number)
    starter = _starter()
    _check_arguments(given, starter)
    if count == 1:
        return None
    if address is not None and count is not None and number is not None:
        return address, count, number, None
    if not (starter or any(given.values()) or _is_tpu_vm()):
        return None
    from jax._src.clusters import ClusterEnv

    try:
        # As in jax.distributed.initialize: the roll is called with the result.
        found = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, number, None, None, timeout
        )
        reason = "it does not know this kind of start"
    except Exception as error:  # whatever its requests to servers of a cloud raise
        found, reason = (address, count, number, None), f"{type(error).__name__}: {error}"
    address, count, number, devices = found
    if address is not None and count is not None and number is not None:
        return (address, count, number, devices) if count > 1 else None
    if starter or any(given.values()):
        raise UserError(
            f"{starter or 'the flags'} speaks of several processes, but JAX does not find out "
            f"about the others ({reason}): pass --coordinator_address, --num_processes and "
            "--process_id"
        )
    return None


def _check_arguments(given: dict[str, Any], starter: str) -> None:
    address, count, number = given.values()
    missing = [f"--{name}" for name, value in given.items() if value is None]
    problem = ""
    if 0 < len(missing) < 3 and not starter and count != 1:
        there = ", ".join(f"--{name}={x}" for name, x in given.items() if x is not None)
        problem = (
            f"{there} came without {' and '.join(missing)}: pass all three, or none where Slurm, "
            "Open MPI or a TPU pod starts the processes"
        )
    elif None not in (count, number) and number >= count:
        problem = (
            f"--process_id={number} does not exist with --num_processes={count}: they are 0 to "
            f"{count - 1}"
        )
    elif address is not None and not re.fullmatch(r".+:\d+", address):
        problem = (
            f"--coordinator_address={address} has no port: write HOST:PORT, a port of process 0 "
            "that is free and that the others can reach"
        )
    if problem:
        raise UserError(problem)


def _starter() -> str:
    """Who has started further processes beside this one, as the environment says; '' if nobody."""
    variables = os.environ

    def are_several(name: str) -> bool:
        return variables.get(name, "1") not in ("", "0", "1")

    # Without a step's list of nodes, this is a shell or a batch script, started once; so is a shell
    # of `salloc`, a step of one task or with a number of its own.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    is_shell = variables.get("SLURM_STEP_ID") == _SLURM_INTERACTIVE_STEP
    if "SLURM_STEP_NODELIST" in variables and are_several(tasks) and not is_shell:
        return "Slurm"
    if are_several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    hosts = variables.get("TPU_PROCESS_ADDRESSES", variables.get("TPU_WORKER_HOSTNAMES", ""))
    return "a TPU pod" if "," in hosts or are_several("MEGASCALE_NUM_SLICES") else ""


def _is_tpu_vm() -> bool:
    """Whether TPUs are here, and with them perhaps a pod, of which a server of the cloud knows."""
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
