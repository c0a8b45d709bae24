"""HTTP to one vLLM server: token ids in, token ids and log-probabilities out.

Standard library only, one connection a request: what a restarted server leaves behind is never
reused. The API key goes into a header and nowhere else.
"""

from __future__ import annotations

import http.client
import json
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from distill.base.errors import UserError
from distill.config.policy import VllmServers

# Sampling options are always sent: servers take defaults from the model's generation_config.json.
_PLAIN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_TRY_AGAIN = (408, 425, 429)


class VllmError(Exception):
    """No usable reply; `status` is that of HTTP, None when there was no reply at all."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class ServerFailed(VllmError):
    """Worth another try, as the server may be restarting."""


class RequestRefused(VllmError):
    """The server will not do this; another try would end the same way."""


class Completion(NamedTuple):
    """One sampled response: its token ids, and their log-probabilities as the server has them."""

    token_ids: list[int]
    log_probs: list[float]


# Of one position: token ids and their log-probabilities, the token itself first.
Scores = tuple[list[int], list[float]]


class VllmClient:
    """Requests to one server, from any number of threads.

    `check_running` is called when there is no reply, and raises if another try is in vain. Every
    method raises ServerFailed (try again), RequestRefused (do not), or UserError for a missing or
    wrong key.
    """

    def __init__(
        self,
        url: str,
        api_key: str = "",
        timeout: float = 600.0,
        check_running: Callable[[], None] = lambda: None,
    ):
        self.url, self._api_key, self._timeout = url, api_key, timeout
        self._check_running = check_running

    def get(self, path: str, timeout: float | None = None) -> Any:
        return self._request("GET", path, None, timeout or self._timeout)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._request("POST", path, json.dumps(body or {}).encode(), self._timeout)

    def complete(self, prompt: list[int], **options: Any) -> Completion:
        """Samples one response; `options` are fields of the completions API."""
        body = {**_PLAIN, "ignore_eos": True, "logprobs": 0, "return_token_ids": True, **options}
        choice = self._choice({"prompt": prompt, **body})
        if choice.get("finish_reason") not in ("stop", "length"):
            raise self._failed(f"a response ended by {choice.get('finish_reason')!r}")
        token_ids = choice.get("token_ids")
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(token_ids, list) or not isinstance(log_probs, list):
            raise self._failed(
                "a reply without token_ids or logprobs: it needs a vLLM that knows "
                "return_token_ids (measured with 0.32)",
                200,
            )
        ids_are_ids = all(isinstance(token, int) and token >= 0 for token in token_ids)
        if not token_ids or len(log_probs) != len(token_ids) or not ids_are_ids:
            raise self._failed("a damaged reply: ids and log-probabilities do not match")
        if not all(map(_is_log_prob, log_probs)):
            raise self._failed("a damaged reply: log-probabilities that are none")
        return Completion(token_ids, log_probs)

    def score(self, tokens: list[int], top_k: int = 0) -> list[Scores]:
        """Log-probabilities of tokens[1:], at temperature 1 and untruncated.

        The `top_k` likeliest tokens are listed beside the actual one. One token more than `tokens`,
        of which there are at least two, must fit into the server's context.
        """
        options = {**_PLAIN, "max_tokens": 1, "prompt_logprobs": top_k}
        entries = self._choice({"prompt": tokens, **options}).get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(tokens):
            raise self._failed("a damaged reply: prompt_logprobs are not one for each token")
        try:
            return list(map(_scores, tokens[1:], entries[1:]))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._failed("a damaged reply: prompt_logprobs without the tokens") from None

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.post("/v1/completions", body)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._failed("a damaged reply: not exactly one choice")
        return choices[0]

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> Any:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"Connection": "close", "Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        connection = connect(parts.hostname or "", parts.port, timeout=timeout)
        try:
            connection.request(method, parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            return self._parsed(path, response.status, response.read())
        except TimeoutError:
            raise self._failed(f"no answer to {path} within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            self._check_running()
            raise self._failed(f"{type(error).__name__} at {path}: {error}") from None
        finally:
            connection.close()

    def _parsed(self, path: str, status: int, content: bytes) -> Any:
        if status in (401, 403):
            given = "does not accept the API key" if self._api_key else "wants an API key"
            raise UserError(
                f"{self.url} {given} (status {status}): put it into an environment variable, "
                "whose name goes into api_key_variable"
            )
        try:
            reply = json.loads(content) if content else None
        except ValueError:
            reply = content[:200].decode(errors="replace")
            if status < 400:
                raise self._failed(f"a reply to {path} that is not JSON") from None
        if status < 400:
            return reply
        raise self._failed(f"status {status} at {path}: {_message(reply)}", status)

    def _failed(self, message: str, status: int | None = None) -> VllmError:
        if self._api_key:  # servers and proxies may repeat what they were sent
            message = message.replace(self._api_key, "...")
        refused = status is not None and status < 500 and status not in _TRY_AGAIN
        return (RequestRefused if refused else ServerFailed)(f"{self.url}: {message}", status)


def connect(servers: VllmServers, section: str) -> list[VllmClient]:
    """A client per URL; UserError when the API key's variable is not set."""
    key = read_api_key(servers.api_key_variable, section)
    return [VllmClient(url, key, servers.request_timeout) for url in servers.urls]


def read_api_key(variable: str, section: str) -> str:
    """The key in an environment variable, '' for none.

    Raises:
      UserError: the variable is empty; it is not shown, as it may be the key itself.
    """
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise UserError(
            f"{section}.api_key_variable names an environment variable that is not set: export it "
            "with the API key as its value"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the API key for {section} holds characters that HTTP does not allow")
    return key


def _scores(token: int, entry: dict[str, Any]) -> Scores:
    """The actual token first; the others as they come."""
    log_probs = {int(key): float(value["logprob"]) for key, value in entry.items()}
    if not all(map(_is_log_prob, log_probs.values())):
        raise ValueError
    own = log_probs.pop(token)
    return [token, *log_probs], [own, *log_probs.values()]


def _is_log_prob(value: Any) -> bool:
    # A little above 0 by rounding; NaN fails.
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3


def _message(reply: Any) -> str:
    """The server's own words, on one line."""
    if isinstance(reply, dict):
        reply = reply.get("error", reply.get("detail", reply))
    if isinstance(reply, dict):
        reply = reply.get("message", reply)
    return " ".join(str(reply).split())[:300]
