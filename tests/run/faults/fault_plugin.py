"""Signals its own process at a chosen moment: FAULT=POINT:CALL:SIGNAL, a plugin for real runs.

The moments are calls of the product's functions: CALL=2 is the second one in this process. Every
fault that happens adds a line to the file named by FAULT_LOG, so that tests know which have.
SIGNAL may also be `full`: from then on no file may grow beyond 4 kB, as on a disk that is full; or
`error`, an exception that nobody expects.
"""

import functools
import os
import resource
import signal
import threading
import time

import jax

from distill import trainer
from distill.base import manifest
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.recorder import RolloutRecorder
from distill.models.checkpoints import export as hf_export
from distill.rollout.in_process import JaxBackend
from distill.run import checkpoint, progress
from distill.run.writers import JsonLines
from distill.sampling.schedule import Run

# name: (owner, attribute, whether the moment is after the call instead of before it)
POINTS = {
    "evaluate": (Evaluator, "__call__", False),
    "evaluate-sampled": (Evaluator, "grade", False),
    "evaluated": (Evaluator, "__call__", True),
    "rollouts": (RolloutRecorder, "__call__", True),
    "generate": (JaxBackend, "generate", False),
    "generate-prefilled": (Run, "_decode", False),
    "generate-decoded": (Run, "_decode", True),
    "train": (progress.Progress, "end_step", False),
    "logged": (JsonLines, "note", True),
    "save": (checkpoint.Checkpoints, "save", False),
    "save-started": (checkpoint.Checkpoints, "save", True),
    "save-committed": (checkpoint, "write_manifest", False),
    "save-digest": (manifest, "_digest", False),
    "save-summed": (checkpoint, "write_manifest", True),
    "save-renamed": (checkpoint, "_sync", False),
    "save-pruning": (checkpoint.shutil, "rmtree", False),
    "restore": (checkpoint.Checkpoints, "restore", False),
    "restored": (checkpoint.Checkpoints, "restore", True),
    "export": (trainer, "export_student", False),
    "export-weights": (hf_export, "_write_weights", True),
    "export-rename": (hf_export, "replace_folder", False),
    "exported": (trainer, "export_student", True),
    "report": (trainer, "write_report", False),
    "results": (os, "replace", False),
}


def strike(name: str, action: str) -> None:
    with open(os.environ["FAULT_LOG"], "a") as log:
        log.write(f"{name} {action}\n")
    if action == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return
    if action == "error":
        raise RuntimeError("a fault")
    os.kill(os.getpid(), getattr(signal, action))
    time.sleep(0.5)  # a signal that is handled is handled by another thread


def install(name: str, call: int, action: str) -> None:
    owner, attribute, after = POINTS[name]
    original, calls, lock = getattr(owner, attribute), [], threading.Lock()

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        with lock:
            calls.append(None)
            now = len(calls) == call
        if now and not after:
            strike(name, action)
        result = original(*args, **kwargs)
        if now and after:
            jax.block_until_ready(result)
            strike(name, action)
        return result

    setattr(owner, attribute, wrapped)


def install_delay(seconds: float, action: str) -> None:
    """Some time after the first step."""
    end_step = progress.Progress.end_step

    def wrapped(self, *args):
        end_step(self, *args)
        if not wrapped.begun:
            wrapped.begun = True
            timer = threading.Timer(seconds, strike, ("delay", action))
            timer.daemon = True
            timer.start()

    wrapped.begun = False
    progress.Progress.end_step = wrapped


for fault in filter(None, os.environ.get("FAULT", "").split(",")):
    point, number, action = fault.split(":")
    if point == "delay":
        install_delay(float(number), action)
    else:
        install(point, int(number), action)
