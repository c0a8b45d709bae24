"""Commands of the product in forks of a process that has imported it: a start takes less time.

A fork has an environment, a folder, files for what it prints and a main module of its own, and may
be killed. JAX reads its settings as it is imported: they are those of the first process.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path


class Forks:
    """Use as a context. `environment` is that of the process that imports."""

    def __init__(self, environment: Mapping[str, str]):
        self._first = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_) -> None:
        self._first.communicate()

    def run(
        self, command: list[str], folder: Path, output: Path, seconds: float = 300, **environment
    ) -> subprocess.CompletedProcess:
        """Of `python -m MODULE ...` in `folder`; what it prints goes through `output`, a folder."""
        assert command[1] == "-m", command
        request = dict(argv=command[2:], folder=str(folder), environment=environment)
        files = [output / name for name in ("stdout", "stderr")]
        process = self._ask(request | dict(files=list(map(str, files))))
        timer = threading.Timer(seconds, os.kill, (process, signal.SIGABRT))
        timer.start()
        status = int(self._first.stdout.readline())
        timer.cancel()
        texts = (file.read_text() for file in files)
        return subprocess.CompletedProcess(command, status, *texts)

    def _ask(self, request: dict) -> int:
        print(json.dumps(request), file=self._first.stdin, flush=True)
        return int(self._first.stdout.readline())


def serve() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import distill.scratch
    import distill.trainer  # noqa: F401

    for line in sys.stdin:
        if not (process := os.fork()):
            return become(**json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def become(
    argv: list[str], folder: str, environment: dict[str, str], files: tuple[str, str]
) -> None:
    """As if it had just been started; what it raises ends the process as it would there."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = argv
    sys.path.insert(0, "")
    sys.modules.pop(argv[0], None)
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
