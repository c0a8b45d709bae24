"""From a dataset's texts to token prompts and responses within the length limits."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill.data.base import DatasetInterface, Example
from distill.errors import UserError

_WIDTH_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The rows of a dataset that fit, in the dataset's order.

    Attributes:
        rows: dataset index of each kept row, int64.
        prompt_tokens: token ids of each kept row; equal prompts share one array.
        response_tokens: token ids of the reference responses, EOS included; None when not asked
            for.
        dropped: number of rows left out, by reason; reasons that never applied are absent.
        pad_id: fills up to the widths.
    """

    rows: np.ndarray
    prompt_tokens: list[np.ndarray]
    response_tokens: list[np.ndarray] | None
    dropped: dict[str, int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def prompt_width(self) -> int:
        """Longest kept prompt, rounded up to a multiple of 8."""
        return _width(self.prompt_tokens)

    @functools.cached_property
    def response_width(self) -> int:
        """Longest kept response, rounded up to a multiple of 8; 0 when there are none."""
        return _width(self.response_tokens or [])

    def summary(self) -> str:
        """One line for the log."""
        lengths = [len(tokens) for tokens in self.prompt_tokens]
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return (
            f"{len(self)} prompts of {min(lengths)} to {max(lengths)} tokens; "
            f"dropped: {dropped or 'none'}"
        )


def tokenize_prompts(
    dataset: DatasetInterface,
    tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int = 0,
    needs_responses: bool = False,
    system_prompt: str = "",
    prompt_template: str = "",
) -> Prompts:
    """Tokenises a dataset; rows that do not fit are dropped and counted, never truncated.

    A tokenizer with a chat template renders the prompt as a user's message (a list of messages as
    it is) followed by the opening of the answer. Without one the prompt is plain text.

    Args:
        dataset: the source of texts.
        tokenizer: a transformers fast tokenizer.
        max_prompt_length: most tokens of a prompt, with everything the chat template adds.
        max_response_length: most tokens of a response, EOS included; used with `needs_responses`.
        needs_responses: tokenise the responses, and drop rows without one.
        system_prompt: system message put before the prompt; '' is none.
        prompt_template: text with one '{problem}' that wraps the prompt (the last message of a
            list); '' takes the dataset's own.

    Raises:
        UserError: bad template, a list of messages without a chat template, or nothing is left.
    """
    template = prompt_template or dataset.get_prompt_template()
    if template.count("{problem}") != 1:
        raise UserError(
            f"data.prompt_template={template!r} must have {{problem}} exactly once, where the "
            "prompt goes"
        )
    examples = [dataset[i] for i in range(len(dataset))]
    prompts = _encode_prompts(examples, tokenizer, template, system_prompt)
    responses = _encode_responses(examples, tokenizer) if needs_responses else None

    def reason_to_drop(i: int) -> str | None:
        if len(prompts[i]) == 0:
            return "prompts without a token"
        if len(prompts[i]) > max_prompt_length:
            return f"prompts longer than {max_prompt_length} tokens"
        if responses is None:
            return None
        if responses[i] is None:
            return "rows without a response"
        if len(responses[i]) > max_response_length:
            return f"responses longer than {max_response_length} tokens with the end token"
        return None

    kept, dropped = _partition(len(examples), reason_to_drop)
    if not kept:
        raise UserError(_nothing_left(len(examples), dropped))
    return Prompts(
        rows=np.array(kept, np.int64),
        prompt_tokens=[prompts[i] for i in kept],
        response_tokens=None if responses is None else [responses[i] for i in kept],
        dropped=dropped,
        pad_id=_pad_id(tokenizer),
    )


def _encode_prompts(
    examples: Sequence[Example], tokenizer, template: str, system_prompt: str
) -> list[np.ndarray]:
    # A curriculum repeats its problems: each distinct prompt is rendered and encoded once.
    keys = [json.dumps(example.prompt) for example in examples]
    unique = {key: example.prompt for key, example in zip(keys, examples, strict=True)}
    messages = [_messages(prompt, template, system_prompt) for prompt in unique.values()]
    if not messages:
        return []
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer([_plain_text(turns) for turns in messages])["input_ids"]
    encoded = {key: np.array(i, np.int32) for key, i in zip(unique, ids, strict=True)}
    return [encoded[key] for key in keys]


def _messages(prompt: str | list[dict[str, str]], template: str, system_prompt: str) -> list[dict]:
    wrapped = wrap_prompt(prompt, template)
    turns = [{"role": "user", "content": wrapped}] if isinstance(wrapped, str) else wrapped
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, *turns]


def wrap_prompt(prompt: str | list[dict[str, str]], template: str) -> str | list[dict[str, str]]:
    """The prompt, or the last of its messages, in the place of '{problem}' in the template."""
    # Not str.format: LaTeX in templates is full of braces.
    if isinstance(prompt, str):
        return template.replace("{problem}", prompt)
    return [*prompt[:-1], {**prompt[-1], "content": wrap_prompt(prompt[-1]["content"], template)}]


def _plain_text(turns: list[dict[str, str]]) -> str:
    system, user = turns[:-1], turns[-1]
    if len(system) > 1 or any(turn["role"] != "system" for turn in system):
        raise UserError(
            "the dataset's prompts are lists of chat messages, but the tokenizer has no chat "
            "template: use an instruction-tuned model's tokenizer or prompts of plain text"
        )
    return "\n\n".join(turn["content"] for turn in [*system, user])


def _encode_responses(examples: Sequence[Example], tokenizer) -> list[np.ndarray | None]:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, so responses could never end; set one")
    present = {i: e.response for i, e in enumerate(examples) if e.response and e.response.strip()}
    responses: list[np.ndarray | None] = [None] * len(examples)
    if present:
        ids = tokenizer(list(present.values()), add_special_tokens=False)["input_ids"]
        for i, tokens in zip(present, ids, strict=True):
            responses[i] = np.array([*tokens, tokenizer.eos_token_id], np.int32)
    return responses


def _partition(
    count: int, reason_to_drop: Callable[[int], str | None]
) -> tuple[list[int], dict[str, int]]:
    kept, dropped = [], {}
    for i in range(count):
        reason = reason_to_drop(i)
        if reason is None:
            kept.append(i)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    return kept, dropped


def _nothing_left(total: int, dropped: dict[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    remedies = {
        "prompts longer": "raise policy.max_total_sequence_length",
        "responses longer": "raise distillation.generate_strategy.max_length",
        "without a response": "set data.response_column to where the responses are",
    }
    advice = [remedy for reason, remedy in remedies.items() if reason in reasons]
    return (
        f"none of {total} rows can be used: {reasons or 'the split is empty'}; "
        f"{' and '.join(advice) or 'check data.path'}"
    )


def _pad_id(tokenizer) -> int:
    # Padding is never read (masks come from lengths), so any valid id does.
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def _width(tokens: Sequence[Any]) -> int:
    longest = max((len(row) for row in tokens), default=0)
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
