"""One text after the other as token ids, or the reason why it has none that could be used."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from distill.base.errors import UserError
from distill.data.base import Example
from distill.data.chat import Chat, Refused
from distill.data.tokenizer import response_end

FEEDBACK = "feedback"
# Texts of an example that the teacher's template may name beside the problem.
FIELDS: dict[str, Callable[[Example], str | None]] = {
    "response": lambda example: example.response,
    "answer": lambda example: next(iter(example.answers), None),
}


def check_template(section: str, template: str, fields: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Those of `fields` that the template names; UserError if it names others, or no problem."""
    key = f"{section}.prompt_template={template!r}"
    if template.count("{problem}") != 1:
        raise UserError(f"{key} must have {{problem}} exactly once, where the prompt goes")
    # Braces behind a command of LaTeX, an index or another argument name nothing.
    named = re.findall(r"(?<![\\\w}^_]){([a-z_]+)}", template) if fields else []
    if unknown := [name for name in named if name not in ("problem", *fields)]:
        raise UserError(
            f"{key} names {{{unknown[0]}}}, which examples do not have: the fields are "
            f"{', '.join(f'{{{name}}}' for name in ('problem', *fields))}"
        )
    return tuple(name for name in fields if f"{{{name}}}" in template)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Tokens of prompts and responses at most, characters of the longest, ids, and the key."""

    prompt: int
    response: int
    longest_piece: int
    ids: int
    keep_truncated: bool


def longest_piece(tokenizer) -> int:
    # Holds wherever no token stands for more characters than its own: not for tokenizers that
    # make one unknown token of a long word, whose prompt would say nothing either.
    return max(map(len, tokenizer.get_vocab()))


# Token ids, or the reason why a text has none that could be used.
Encoded = np.ndarray | str


def arrays(encoded: list[Encoded], kept: list[int]) -> list[np.ndarray]:
    return [tokens for i in kept if isinstance(tokens := encoded[i], np.ndarray)]


def encode_prompts(
    examples: Sequence[Example],
    chat: Chat,
    limits: Limits,
    notes: list[tuple[str, str]],
    fields: tuple[str, ...] = (),
    section: str = "",
) -> list[Encoded]:
    too_long = f"prompts longer than {limits.prompt} tokens"
    most_characters = limits.prompt * limits.longest_piece
    # A curriculum repeats its problems: each distinct prompt is rendered and encoded once.
    named = [{name: FIELDS[name](example) or "" for name in fields} for example in examples]
    keys = [json.dumps([e.prompt, texts]) for e, texts in zip(examples, named, strict=True)]
    encoded: dict[str, Encoded] = {}
    texts: dict[str, str] = {}
    for key, example, of_example in zip(keys, examples, named, strict=True):
        if key in encoded or key in texts:
            continue
        if missing := next((name for name, text in of_example.items() if not text), None):
            encoded[key] = f"rows without the {{{missing}}} that {section}.prompt_template names"
            continue
        try:
            text = chat.render(example.prompt, of_example)
        except Refused as refusal:
            encoded[key] = str(refusal)
            continue
        whole = chat.restored(text)
        if len(whole) > most_characters:
            encoded[key] = too_long
        elif not _is_unicode(text):
            encoded[key] = "prompts that are not Unicode text"
        else:
            texts[key] = text
            if whole != text:
                notes.append((_SPELLED.format("prompts"), example.id))
    # A chat template has put the special tokens where they belong.
    plain = not chat.tokenizer.chat_template
    ids = chat.encode(list(texts.values()), add_special_tokens=plain)
    for key, tokens in zip(texts, ids, strict=True):
        if not tokens:
            encoded[key] = "prompts without a token"
        elif max(tokens) >= limits.ids:
            encoded[key] = _UNKNOWN.format("prompts")
        elif plain and len(tokens) > 1 and tokens[0] == tokens[1] == chat.tokenizer.bos_token_id:
            encoded[key] = "prompts with two begin tokens, of data.prompt_template and tokenizer"
        else:
            fits = len(tokens) <= limits.prompt
            encoded[key] = np.array(tokens, np.int32) if fits else too_long
    return [encoded[key] for key in keys]


_UNKNOWN = "{} with tokens that the models have no embedding for"
_SPELLED = "{} that spell special tokens, which are text there (data.special_tokens)"


def encode_responses(
    examples: Sequence[Example], chat: Chat, limits: Limits, notes: list[tuple[str, str]]
) -> list[Encoded]:
    tokenizer = chat.tokenizer
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, so responses could never end; set one")
    too_long = f"responses longer than {limits.response} tokens with the end token"
    end = response_end(tokenizer)
    endings = tuple(tokenizer.convert_ids_to_tokens([end, tokenizer.eos_token_id]))
    encoded: dict[int, Encoded] = {}
    texts: dict[int, str] = {}
    for i, example in enumerate(examples):
        response = example.response or ""
        if ending := next((e for e in endings if response.rstrip().endswith(e)), None):
            response = response.rstrip().removesuffix(ending)
            notes.append(("responses with an end token, which is not doubled", example.id))
        if not response.strip():
            encoded[i] = "rows without a response"
        elif example.truncated and not limits.keep_truncated:
            encoded[i] = "responses that were cut off (data.keep_truncated=False)"
        elif len(response) > limits.response * limits.longest_piece:
            encoded[i] = too_long
        elif not _is_unicode(response):
            encoded[i] = "responses that are not Unicode text"
        else:
            texts[i] = chat.protected(response)
            if texts[i] != response:
                notes.append((_SPELLED.format("responses"), example.id))
    ids = chat.encode(list(texts.values()), add_special_tokens=False)
    for i, tokens in zip(texts, ids, strict=True):
        tokens = tokens if examples[i].truncated else [*tokens, end]
        if max(tokens, default=0) >= limits.ids:
            encoded[i] = _UNKNOWN.format("responses")
        else:
            fits = len(tokens) <= limits.response
            encoded[i] = np.array(tokens, np.int32) if fits else too_long
    return [encoded[i] for i in range(len(examples))]


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
