"""A stand-in for a vLLM server that can be told to fail, for faults no real one shows on demand."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

MAX_MODEL_LEN = 64
VOCAB_SIZE = 20
LENGTH = 4  # of every answer
SLOW = 1.0  # seconds that a hanging answer takes


def answer_tokens(prompt: list[int], seed: int, weights: str) -> list[int]:
    """Never the end token 1 before the end; always at it."""
    mixed = hashlib.sha256(repr((prompt, seed, weights)).encode()).digest()
    return [2 + mixed[i] % (VOCAB_SIZE - 2) for i in range(LENGTH - 1)] + [1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections at once are the rule here

    def handle_error(self, request, client_address):
        """Connections are cut on purpose."""


class Double:
    """One server on a free port; `faults` maps a path to what is done instead, once each.

    A fault is called with the handler, and returns whether the request was dealt with.
    """

    def __init__(self, api_key: str = "", logprobs_mode: str = "processed_logprobs"):
        self.api_key, self.logprobs_mode = api_key, logprobs_mode
        self.faults: list[tuple[str, Callable]] = []
        self.requests: list[tuple[str, dict]] = []
        self.loaded, self.version = "start", "default"
        self.dev_mode, self.max_model_len = True, MAX_MODEL_LEN
        self.tokenize = lambda text: [ord(character) - 97 for character in text]
        self.lock = threading.Lock()
        double = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                double.handle(self, {})

            def do_POST(self):
                size = int(self.headers["Content-Length"])
                double.handle(self, json.loads(self.rfile.read(size)))

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def restart(self) -> None:
        """As if a supervisor had restarted it between two requests."""
        self.loaded, self.version = "start", "default"

    def handle(self, handler, body: dict) -> None:
        path = urlsplit(handler.path).path
        with self.lock:
            self.requests.append((path, body))
            fault = next((f for f in self.faults if f[0] == path), None)
            if fault is not None:
                self.faults.remove(fault)
        if fault is not None and fault[1](handler):
            return
        sent = handler.headers.get("Authorization")
        if self.api_key and path.startswith("/v1") and sent != f"Bearer {self.api_key}":
            reply(handler, {"error": "Unauthorized"}, 401)
            return
        answer = self.answer(path, body)
        if answer is None:
            reply(handler, {"detail": "Not Found"}, 404)
        else:
            reply(handler, answer)

    def answer(self, path: str, body: dict) -> dict | None:
        if path == "/health":
            return {}
        if path == "/v1/models":
            return {"data": [{"id": "double", "max_model_len": self.max_model_len}]}
        if path == "/tokenize":
            return {"tokens": self.tokenize(body["prompt"])}
        if path == "/v1/completions":
            return {"choices": [self.choice(body)]}
        if not self.dev_mode:
            return None
        if path == "/server_info":
            return {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}}
        if path == "/collective_rpc":
            self.loaded = body["kwargs"]["weights_path"]
        if path == "/update_weight_version":
            self.version = body["new_version"]
        known = "/pause /resume /collective_rpc /reset_prefix_cache /update_weight_version"
        if path in known.split():
            return {"success": True}
        return {"weight_version": self.version} if path == "/weight_info" else None

    def choice(self, body: dict) -> dict:
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            listed = range(body["prompt_logprobs"])
            entries = [
                {str(i): {"logprob": -0.5 - i} for i in {*listed, token}} for token in prompt[1:]
            ]
            return {"prompt_logprobs": [None, *entries], "finish_reason": "length"}
        allowed = body.get("allowed_token_ids", [0])
        if allowed[0] >= VOCAB_SIZE:
            raise AssertionError("the checks' question about ids is not asked of the double")
        tokens = answer_tokens(prompt, body.get("seed", 0), self.loaded)[: body["max_tokens"]]
        return {
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [-0.25 * (1 + i) for i in range(len(tokens))]},
            "finish_reason": "stop",
        }


def reply(handler, content, status: int = 200, *, promised: int = 0) -> bool:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text) + promised))
    handler.end_headers()
    handler.wfile.write(text)
    return True


# ---- faults of one completion ----


def unavailable(handler) -> bool:
    return reply(handler, {"error": {"message": "starting"}}, 503)


def engine_died(handler) -> bool:
    return reply(handler, {"error": {"message": "EngineCore encountered an issue."}}, 500)


def half_an_answer(handler) -> bool:
    reply(handler, b'{"choices": [{"tok', promised=400)
    handler.close_connection = True
    return True


def hang_up(handler) -> bool:
    handler.close_connection = True
    handler.connection.close()
    return True


def too_slow(handler) -> bool:
    time.sleep(SLOW)
    return hang_up(handler)


def not_json(handler) -> bool:
    return reply(handler, b"<html>proxy error</html>")


def _choices(*choices: dict) -> Callable:
    return lambda handler: reply(handler, {"choices": list(choices)})


def _choice(**changes) -> dict:
    whole = {"token_ids": [5, 1], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    return {**whole, "finish_reason": "stop", **changes}


no_choice = _choices()
two_choices = _choices(_choice(), _choice())
no_tokens = _choices(_choice(token_ids=[], logprobs={"token_logprobs": []}))
log_prob_missing = _choices(_choice(logprobs={"token_logprobs": [-1.0]}))
log_prob_nan = _choices(_choice(logprobs={"token_logprobs": [-1.0, math.nan]}))
aborted = _choices(_choice(finish_reason="abort"))

FAULTS = {
    name: fault
    for name, fault in globals().copy().items()
    if callable(fault)
    and name
    in "unavailable engine_died half_an_answer hang_up too_slow not_json no_choice two_choices "
    "no_tokens log_prob_missing log_prob_nan aborted".split()
}
