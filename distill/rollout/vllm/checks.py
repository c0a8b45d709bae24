"""What is asked of a server before it is relied on; each answer that will not do is one line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.base.errors import UserError
from distill.models.checkpoints.load import load_model_config
from distill.models.facts import ModelConfig
from distill.rollout.vllm.client import RequestRefused, ServerFailed, VllmClient
from distill.rollout.vllm.weights import architecture

_TEXTS = 24  # compared between tokenizers
_TOKENS_A_TEXT = 16


def await_up(clients: Sequence[VllmClient], timeout: float, section: str) -> None:
    """Waits until all servers answer.

    Raises:
      UserError: one does not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    for client in clients:
        while True:
            try:
                client.get("/health", timeout=5)
                break
            except (ServerFailed, RequestRefused) as error:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"no vLLM server answered within {timeout:g} s ({error}): start it, or "
                        f"correct {section}.urls or raise {section}.start_timeout"
                    ) from None
            time.sleep(min(1.0, max(deadline - time.monotonic(), 0.0)))


def max_model_len(client: VllmClient) -> int:
    """Tokens of prompt and answer that the server has room for.

    Raises:
      UserError: this is no vLLM server.
    """
    try:
        return int(client.get("/v1/models")["data"][0]["max_model_len"])
    except (RequestRefused, KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            f"{client.url} answers, but not as a vLLM server: /v1/models names no max_model_len"
        ) from None


def check_context(client: VllmClient, needed: int) -> int:
    """The server's context, which must hold `needed` tokens."""
    room = max_model_len(client)
    if room < needed:
        raise UserError(
            f"{client.url} has a context of {room} tokens, but needs {needed} (policy."
            "max_total_sequence_length, and one more where it scores): start it with "
            f"--max-model-len {needed}, or lower policy.max_total_sequence_length"
        )
    return room


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
    answer = client.get("/server_info", config_format="json")
    try:
        mode = answer["vllm_config"]["model_config"]["logprobs_mode"]
    except (KeyError, TypeError):
        mode = "no logprobs_mode"
    if mode != "processed_logprobs":
        raise UserError(
            f"{client.url} reports {mode}, which do not tell the probabilities that tokens are "
            "drawn with at this temperature or truncation: start it with --logprobs-mode "
            "processed_logprobs, or sample at temperature 1 without truncation"
        )


def visible_folder(client: VllmClient) -> Path | None:
    """The folder that the server was started from, if it can be seen from here."""
    folder = Path(str(client.get("/v1/models")["data"][0].get("root", "")))
    return folder if (folder / "config.json").is_file() else None


def is_tied(client: VllmClient) -> bool:
    """Whether the server's model is known to tie its output head to the embedding."""
    folder = visible_folder(client)
    return folder is not None and load_model_config(folder)[0].tied


def check_same_model(client: VllmClient, student: ModelConfig, vocab_size: int) -> None:
    """Raises UserError if the student's weights would not fit into the server's model.

    The server's config.json is read where it is visible from here. Its vocabulary is asked for: ids
    are allowed or not.
    """
    folder = visible_folder(client)
    if folder is not None:
        theirs, ours = architecture(load_model_config(folder)[0]), architecture(student)
        for name, value in ours.items():
            if theirs[name] != value:
                raise UserError(
                    f"{client.url} serves another model than the student: {name} is "
                    f"{theirs[name]} there and {value} here; start it from a folder of `python -m "
                    "distill.export_server`"
                )
    fits = _knows_id(client, vocab_size - 1), not _knows_id(client, vocab_size)
    if not all(fits):
        size = "fewer" if not fits[0] else "more"
        raise UserError(
            f"{client.url} serves a model with {size} than the {vocab_size} ids of the student's "
            "tokenizer (padding rows count): start it from a folder of `python -m "
            "distill.export_server`"
        )


def check_same_tokenizer(client: VllmClient, tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError if the server gives other ids to the same strings."""
    starts = range(0, vocab_size, max(_TOKENS_A_TEXT, vocab_size // _TEXTS))
    for start in starts:
        ids = range(start, min(start + _TOKENS_A_TEXT, vocab_size))
        text = tokenizer.decode([i for i in ids if i not in tokenizer.all_special_ids])
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
        raise UserError(f"a trial request was refused: {error}") from None
    return True
