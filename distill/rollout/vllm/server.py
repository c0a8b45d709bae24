"""A vLLM server that the trainer starts itself, on loopback, and that ends with it."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from distill.base.errors import RunStopped, UserError
from distill.rollout.vllm import guard


@dataclasses.dataclass
class OwnServer:
    """Starts `python -m vllm.entrypoints.openai.api_server` with an interpreter that has vLLM.

    Without an API key one is made up: others may share the machine.
    """

    python: str
    log: Path
    dtype: str
    max_model_len: int
    api_key: str = ""
    extra_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.api_key = self.api_key or secrets.token_urlsafe(32)
        self._process: subprocess.Popen | None = None

    def check(self) -> None:
        """Raises UserError unless the interpreter is there and has vLLM."""
        probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        name = f"policy.generation.vllm.python={self.python}"
        try:
            done = subprocess.run([self.python, "-c", probe], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(
                f"{name} cannot be run ({type(error).__name__}): give the path of a Python "
                "interpreter that has vLLM"
            ) from None
        if done.returncode:
            raise UserError(
                f"{name} has no package vllm: install it there (it wants an environment of its "
                "own), or give another interpreter"
            )

    def launch(self, model: Path) -> str:
        """Starts serving a model folder and returns the URL, before the server is up."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--dtype", self.dtype, "--max-model-len", str(self.max_model_len),
            "--logprobs-mode", "processed_logprobs", *self.extra_args,
        ]  # fmt: skip
        # The key goes through the environment: arguments are shown to everybody on the machine.
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": self.api_key},
                # Ctrl-C is for the trainer alone, which needs the server to finish its step.
                start_new_session=True,
            )
        return f"http://127.0.0.1:{port}"

    def check_running(self) -> None:
        """Raises RunStopped, with the end of the server's log, if it has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            log = self.log.read_text(errors="replace")
            errors = re.findall(r"\w+Error: .*", log) or log.splitlines() or ["it wrote nothing"]
            raise RunStopped(
                f"the vLLM server that was started here ended with status "
                f"{self._process.returncode}: {errors[-1][-200:]} (see {self.log})"
            )

    def stop(self) -> None:
        """Ends the server and waits until it is gone."""
        if self._process is None:
            return
        assert self._process.stdin is not None  # a pipe
        self._process.stdin.close()
        try:
            self._process.wait(timeout=guard.PATIENCE + 5)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(timeout=guard.PATIENCE + 5)
        self._process = None
