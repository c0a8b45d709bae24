"""What is asked of a server before it is relied on; each reply that will not do is one line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.base.errors import UserError
from distill.config.policy import VllmServers
from distill.data.tokenizer import Vocabulary
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.rollout.vllm.client import RequestRefused, VllmClient, VllmError

_TEXTS, _TOKENS_A_TEXT = 24, 16  # compared between tokenizers
_MAY_DIFFER = ("vocab_size", "tied", "max_positions")  # of an export for servers from the student
_REMEDY = "start it from a folder of `python -m distill.export_server`"


def await_up(client: VllmClient, timeout: float, remedy: str) -> None:
    """Waits until the server answers.

    Raises:
      UserError: it does not within `timeout` seconds; ends with the remedy.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            client.get("/health", timeout=5)
            return
        except VllmError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"no vLLM server answered within {timeout:g} s ({error}): {remedy}"
                ) from None
        time.sleep(min(0.5, max(deadline - time.monotonic(), 0.0)))


def await_all_up(clients: Sequence[VllmClient], servers: VllmServers, section: str) -> None:
    """Waits until all servers of a section answer; see `await_up`."""
    remedy = f"start it, or correct {section}.urls or raise {section}.start_timeout"
    for client in clients:
        await_up(client, servers.start_timeout, remedy)


def check_sampler(
    client: VllmClient,
    *,
    student: ModelConfig,
    vocabulary: Vocabulary,
    context: int,
    tempered: bool,
) -> None:
    """Checks a server that is up and is to sample with the student's weights.

    `context`: tokens that it must have room for. `tempered`: whether tokens are drawn from another
    distribution than the model's own.

    Raises:
      UserError: the server will not do.
    """
    check_context(client, context)
    check_dev_mode(client)
    if tempered:
        check_log_probs_mode(client)
    client.post("/resume")  # a trainer that died during a refit left it paused
    check_same_model(client, student, vocabulary.size)
    check_same_tokenizer(client, vocabulary)


def check_context(client: VllmClient, needed: int) -> None:
    """Raises UserError unless this is a vLLM server with room for `needed` tokens."""
    room = _model_card(client).get("max_model_len")
    if not isinstance(room, int):
        raise UserError(
            f"{client.url} answers, but not as a vLLM server: /v1/models names no max_model_len"
        )
    if room < needed:
        raise UserError(
            f"{client.url} has a context of {room} tokens, but needs {needed} (policy."
            "max_total_sequence_length, and one more where it scores): start it with "
            f"--max-model-len {needed}, or lower policy.max_total_sequence_length"
        )


def check_dev_mode(client: VllmClient) -> None:
    """Raises UserError if the server lacks the routes that change weights."""
    try:
        client.get("/weight_info")
    except RequestRefused:
        raise UserError(
            f"{client.url} has no routes that reload weights: start it with VLLM_SERVER_DEV_MODE=1 "
            "in its environment, in a network where nobody else reaches it"
        ) from None


def check_log_probs_mode(client: VllmClient) -> None:
    """Raises UserError unless the server reports probabilities after temperature and truncation."""
    # Not for what other routes tell too: this one looks through the whole machine first.
    reply = client.get("/server_info?config_format=json")
    try:
        mode = reply["vllm_config"]["model_config"]["logprobs_mode"]
    except (KeyError, TypeError):
        mode = "no logprobs_mode"
    if mode != "processed_logprobs":
        raise UserError(
            f"{client.url} reports {mode}, which do not tell the probabilities that tokens are "
            "drawn with at this temperature or truncation: start it with --logprobs-mode "
            "processed_logprobs, or sample at temperature 1 without truncation"
        )


def check_same_model(client: VllmClient, student: ModelConfig, vocab_size: int) -> None:
    """Raises UserError if the student's weights would not fit into the server's model.

    The server's config.json is read where it is visible from here. Its vocabulary is asked for: ids
    are allowed or not.
    """
    folder = Path(str(_model_card(client).get("root", "")))
    if (folder / "config.json").is_file():
        theirs = dataclasses.asdict(load_model_config(folder)[0])
        for name, value in dataclasses.asdict(student).items():
            if name not in _MAY_DIFFER and theirs[name] != value:
                raise UserError(
                    f"{client.url} serves another model than the student: {name} is "
                    f"{theirs[name]} there and {value} here; {_REMEDY}"
                )
    fewer = not _knows_id(client, vocab_size - 1)
    if fewer or _knows_id(client, vocab_size):
        raise UserError(
            f"{client.url} serves a model with {'fewer' if fewer else 'more'} than the "
            f"{vocab_size} ids of the student's tokenizer (padding rows count): {_REMEDY}"
        )


def check_same_tokenizer(client: VllmClient, vocabulary: Vocabulary) -> None:
    """Raises UserError if the server gives other ids to the same strings."""
    tokenizer, vocab_size = vocabulary.tokenizer, vocabulary.size
    for start in range(0, vocab_size, max(_TOKENS_A_TEXT, vocab_size // _TEXTS)):
        ids = range(start, min(start + _TOKENS_A_TEXT, vocab_size))
        text = str(tokenizer.decode([i for i in ids if i not in tokenizer.all_special_ids]))
        if not text:
            continue
        ours = tokenizer.encode(text, add_special_tokens=False)
        theirs = _tokenize(client, text)
        if ours != theirs:
            differing = (pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1])
            mine, other = next(differing, (len(ours), len(theirs)))
            raise UserError(
                f"{client.url} has another tokenizer than the student: of {text[:40]!r} it makes "
                f"id {other} where the student's makes {mine}; serve a model of the same family"
            )


def _model_card(client: VllmClient) -> dict[str, Any]:
    """What the server says of the model that it serves; empty if it is no vLLM server."""
    try:
        return dict(client.get("/v1/models")["data"][0])
    except (RequestRefused, KeyError, IndexError, TypeError, ValueError):
        return {}


def _tokenize(client: VllmClient, text: str) -> list[int]:
    try:
        return client.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    except (RequestRefused, KeyError, TypeError) as error:
        raise UserError(
            f"{client.url} does not say how it tokenizes ({error}): start it without "
            "--skip-tokenizer-init"
        ) from None


def _knows_id(client: VllmClient, token: int) -> bool:
    try:
        client.complete([0], max_tokens=1, temperature=0.0, allowed_token_ids=[token])
    except RequestRefused as error:
        if "vocab" in str(error):
            return False
        raise
    return True
