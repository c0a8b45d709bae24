"""HTTP to one vLLM server: token ids in, token ids and log-probabilities out.

Standard library only, one connection a request: what a restarted server leaves behind is never
reused. The API key goes into a header and nowhere else.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import os
import socket
import threading
from typing import Any
from urllib.parse import urlencode, urlsplit

from distill.base.errors import UserError

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


class ServerFailed(Exception):
    """No usable answer: worth another try, as the server may be restarting.

    Attributes:
      status: of HTTP, None when there was no answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class RequestRefused(Exception):
    """The server answered that it will not do this; another try would end the same way."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer: its token ids, and their log-probabilities as the server reports them."""

    token_ids: list[int]
    log_probs: list[float]


# Of one position: token ids and their log-probabilities, the token itself first.
Scores = tuple[list[int], list[float]]


class VllmClient:
    """Requests to one server, from any number of threads.

    Args:
      url: http://HOST:PORT or https://HOST:PORT, perhaps with a path before the API's.
      api_key: sent as a bearer token; '' sends none.
      timeout: seconds without an answer after which a request counts as failed.

    Every method raises ServerFailed (try again), RequestRefused (do not), or UserError for a
    missing or wrong API key.
    """

    def __init__(self, url: str, api_key: str = "", timeout: float = 600.0):
        parts = urlsplit(url)
        self.url = url
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port or (443 if secure else 80)
        self._prefix, self._timeout = parts.path.rstrip("/"), timeout
        self._api_key = api_key
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def get(self, path: str, timeout: float | None = None, **query: str) -> Any:
        return self._request("GET", path, query, None, timeout)

    def post(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        return self._request("POST", path, query, body or {}, None)

    def complete(self, prompt: list[int], **options: Any) -> Completion:
        """Samples one answer; `options` are fields of the completions API."""
        body = {**_PLAIN, "ignore_eos": True, "logprobs": 0, "return_token_ids": True, **options}
        choice = self._choice({"prompt": prompt, **body})
        if choice.get("finish_reason") not in ("stop", "length"):
            raise self._failed(f"an answer ended by {choice.get('finish_reason')!r}")
        token_ids, log_probs = choice.get("token_ids"), (choice.get("logprobs") or {})
        log_probs = log_probs.get("token_logprobs")
        if not isinstance(token_ids, list) or not isinstance(log_probs, list):
            raise RequestRefused(
                f"{self.url} returns no token_ids or logprobs: it needs a vLLM that knows "
                "return_token_ids (measured with 0.32)",
                200,
            )
        whole = token_ids and len(log_probs) == len(token_ids) and all(map(_is_id, token_ids))
        if not whole or not all(map(_is_log_prob, log_probs)):
            raise self._failed("a damaged answer: ids and log-probabilities do not match")
        return Completion(token_ids, log_probs)

    def score(self, tokens: list[int], top_k: int = 0) -> list[Scores]:
        """Log-probabilities of tokens[1:], at temperature 1 and untruncated.

        Args:
          tokens: at least two; one more must fit into the server's context.
          top_k: so many of the likeliest tokens are listed beside the actual one.
        """
        options = {**_PLAIN, "max_tokens": 1, "prompt_logprobs": top_k}
        entries = self._choice({"prompt": tokens, **options}).get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(tokens):
            raise self._failed("a damaged answer: prompt_logprobs are not one for each token")
        try:
            return [
                _scores(token, entry) for token, entry in zip(tokens[1:], entries[1:], strict=True)
            ]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._failed("a damaged answer: prompt_logprobs without the tokens") from None

    def close_connections(self) -> None:
        """Ends the requests under way, whose threads get ServerFailed."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            if connection.sock is not None:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has just ended by itself

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.post("/v1/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._failed("a damaged answer: not exactly one choice")
        return choices[0]

    def _request(self, method: str, path: str, query: dict, body: Any, timeout) -> Any:
        target = self._prefix + path + (f"?{urlencode(query)}" if query else "")
        headers = {**self._headers, "Connection": "close"}
        if body is not None:
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection = self._connection(self._host, self._port, timeout=timeout or self._timeout)
        with self._lock:
            self._open.add(connection)
        try:
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except TimeoutError:
            seconds = timeout or self._timeout
            raise self._failed(f"no answer to {path} within {seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(f"{type(error).__name__} at {path}: {error}") from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        return self._parsed(path, status, content)

    def _parsed(self, path: str, status: int, content: bytes) -> Any:
        if status in (401, 403):
            given = "does not accept the API key" if self._headers else "wants an API key"
            raise UserError(
                f"{self.url} {given} (status {status}): put it into an environment variable, "
                "whose name goes into api_key_variable"
            )
        try:
            answer = json.loads(content) if content else None
        except ValueError:
            answer = content[:200].decode(errors="replace")
            if status < 400:
                raise self._failed(f"an answer to {path} that is not JSON") from None
        if status < 400:
            return answer
        message = f"status {status} at {path}: {self._without_key(_message(answer))}"
        if status >= 500 or status in _TRY_AGAIN:
            raise self._failed(message, status)
        raise RequestRefused(f"{self.url}: {message}", status)

    def _without_key(self, message: str) -> str:
        """Servers and proxies may repeat what they were sent."""
        return message.replace(self._api_key, "...") if self._api_key else message

    def _failed(self, message: str, status: int | None = None) -> ServerFailed:
        return ServerFailed(f"{self.url}: {message}", status)


def read_api_key(variable: str, section: str) -> str:
    """The key in an environment variable, '' for none.

    Raises:
      UserError: the variable is empty; it is not shown, as it may be the key itself.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
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


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_log_prob(value: Any) -> bool:
    # A little above 0 by rounding; NaN fails.
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3


def _message(answer: Any) -> str:
    """The server's own words, on one line."""
    if isinstance(answer, dict):
        answer = answer.get("error", answer.get("detail", answer))
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    return " ".join(str(answer).split())[:300]
