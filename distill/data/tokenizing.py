"""From a dataset's texts to token prompts and responses within the length limits."""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.base.errors import UserError
from distill.data.base import DatasetInterface, Dropped, Example, count_drops, examples_of
from distill.data.chat import Chat, Refused
from distill.data.messages import prompt_key
from distill.data.prompts import Prompts, describe_drops
from distill.data.sequences import Sequences
from distill.data.tokenizer import Vocabulary, padding, response_end, vocabulary_size


@dataclasses.dataclass(frozen=True)
class TeacherPrompt:
    """What differs in the prompts that the teacher reads; what is empty is as the student's.

    `template` may name fields of the example beside '{problem}': '{response}' and '{answer}'; and
    '{feedback}', another response to the prompt that has the highest reward, above 0, and what an
    environment replied. Without either, the teacher reads what the student does.
    `rules` are COLUMN=VALUE, any of which an example fits that the teacher is asked about; without
    any, it is asked about all. `section` is of the config. `vocabulary` is the teacher's where it
    has another tokenizer, in whose own chat template it reads prompts; `recut` is of `Prompts`.
    """

    system_prompt: str = ""
    template: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: tuple[str, ...] = ()
    section: str = "teacher"
    vocabulary: Vocabulary | None = None
    recut: Callable[..., Sequences] | None = None

    @property
    def differs(self) -> bool:
        """Whether it reads other prompts."""
        own = self.system_prompt or self.template or self.arguments
        return bool(own or self.vocabulary is not None)

    def asks(self, example: Example) -> bool:
        """Whether the teacher is asked about it."""
        return not self.rules or any(f"{c}={v}" in self.rules for c, v in example.columns.items())


def tokenize_prompts(
    dataset: DatasetInterface,
    tokenizer,
    *,
    max_prompt_length: int,
    max_response_length: int = 0,
    needs_responses: bool = False,
    system_prompt: str = "",
    prompt_template: str = "",
    keep_truncated: bool = True,
    template_arguments: Mapping[str, Any] | None = None,
    special_tokens: str = "text",
    vocab_size: int | None = None,
    teachers: Sequence[TeacherPrompt] = (),
) -> Prompts:
    """Tokenises a dataset; rows that do not fit are dropped and counted, never truncated.

    Texts that cannot fit by their number of characters are dropped before they are tokenised.

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
        keep_truncated: whether responses that were cut off are kept, without an end token.
        template_arguments: further variables of the chat template.
        special_tokens: what those are that the data spells, 'text' or 'control' tokens.
        vocab_size: ids that the models know, where those are fewer than the tokenizer's.
        teachers: what each is asked about, and how its prompts differ from the student's.

    Raises:
        UserError: bad template, a list of messages without a chat template, or nothing is left.
    """
    template, arguments = prompt_template or dataset.get_prompt_template(), template_arguments or {}
    _check_template("data", template)
    make_chat = functools.partial(Chat, special_tokens=special_tokens)
    chat = make_chat(tokenizer, system_prompt=system_prompt, template=template, arguments=arguments)
    examples = examples_of(dataset)
    limits = _Limits(
        max_prompt_length,
        max_response_length,
        _longest_piece(tokenizer),
        vocab_size or vocabulary_size(tokenizer),
        keep_truncated,
    )
    notes: list[tuple[str, str]] = []
    prompts = _encode_prompts(examples, tokenizer, chat, limits, notes)
    asked = [[teacher.asks(example) for example in examples] for teacher in teachers]
    views: list[list[_Encoded] | None] = [None] * len(teachers)
    retelling: list[dict[str, Any]] = [{} for _ in teachers]
    for number, teacher in enumerate(teachers):
        if not teacher.differs:
            continue
        own = teacher.vocabulary
        tokenizer_t = tokenizer if own is None else own.tokenizer
        chat_t = make_chat(
            tokenizer_t,
            system_prompt=teacher.system_prompt or system_prompt,
            template=teacher.template or template,
            arguments={**(arguments if own is None else {}), **teacher.arguments},
            section=teacher.section,
        )
        fields = _check_template(
            teacher.section, teacher.template or template, (*_FIELDS, _FEEDBACK)
        )
        if _FEEDBACK in fields:
            retelling[number] = _retelling(examples, prompts, tokenizer, chat_t, limits, fields)
            chat_t, fields = chat, ()
        wanted, limits_t = list(itertools.compress(examples, asked[number])), limits
        if own is not None:
            more = _more_tokens(wanted, tokenizer, tokenizer_t, limits.response)
            retelling[number] = dict(recut=teacher.recut, recut_excess=more)
            longest = _longest_piece(tokenizer_t)
            limits_t = dataclasses.replace(limits, longest_piece=longest, ids=own.size)
        of_view = chat_t, limits_t, list[tuple[str, str]](), fields, teacher.section
        views[number] = _where(asked[number], _encode_prompts(wanted, tokenizer_t, *of_view))
    responses = None
    if needs_responses:
        responses = _encode_responses(examples, tokenizer, chat, limits, notes)

    def reason_to_drop(i: int) -> str | None:
        encoded = [each[i] for each in (prompts, *views, responses) if each is not None]
        return next((tokens for tokens in encoded if isinstance(tokens, str)), None)

    reasons = [reason_to_drop(i) for i in range(len(examples))]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    pairs = zip(reasons, examples, strict=True)
    misfits = count_drops((reason, example.id) for reason, example in pairs if reason)
    dropped = {**dataset.bad_rows, **misfits}
    if not kept:
        raise UserError(_nothing_left(len(examples), dropped))

    def those_of(
        kept: list[int], view: list[_Encoded] | None = None, retelling: Mapping[str, Any] = _NONE
    ) -> Prompts:
        return Prompts(
            rows=np.array(kept, np.int64),
            prompt_tokens=_arrays(prompts, kept),
            response_tokens=None if responses is None else _arrays(responses, kept),
            dropped=dropped,
            pad_id=padding(tokenizer, limits.ids),
            noted=count_drops(notes),
            keys=tuple(prompt_key(examples[i].prompt) for i in kept),
            view_tokens=None if view is None else _arrays(view, kept),
            **retelling,
        )

    if not teachers:
        return those_of(kept)
    if len(teachers) == 1:
        return those_of(kept, views[0], retelling[0])
    parts = (
        those_of([i for i in kept if asked_i[i]], view, retold)
        for asked_i, view, retold in zip(asked, views, retelling, strict=True)
    )
    return dataclasses.replace(those_of(kept), parts=tuple(parts))


_NONE: Mapping[str, Any] = {}
_FEEDBACK = "feedback"
# Texts of an example that the teacher's template may name beside the problem.
_FIELDS: dict[str, Callable[[Example], str | None]] = {
    "response": lambda example: example.response,
    "answer": lambda example: next(iter(example.answers), None),
}


def _check_template(section: str, template: str, fields: tuple[str, ...] = ()) -> tuple[str, ...]:
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


def _retelling(
    examples: Sequence[Example],
    prompts: Sequence["_Encoded"],
    tokenizer,
    chat: Chat,
    limits: "_Limits",
    fields: tuple[str, ...],
) -> dict[str, Any]:
    """`Prompts.retell` and `retold_excess`: as long as any response, and what the template adds."""
    plain = not tokenizer.chat_template

    def render(row: int, feedback: str) -> list[int]:
        example = examples[row]
        texts = {name: _FIELDS[name](example) or "" for name in fields if name != _FEEDBACK}
        text = chat.render(example.prompt, {**texts, _FEEDBACK: feedback})
        return chat.encode([text], add_special_tokens=plain)[0]

    def retell(row: int, texts: Sequence[np.ndarray]) -> np.ndarray | None:
        said = (tokenizer.decode(text.tolist(), skip_special_tokens=True) for text in texts)
        try:
            tokens = render(row, "\n".join(map(str, said)))
        except Refused:
            return None
        longest = min(limits.prompt, len(prompts[row]) + excess)
        return np.array(tokens, np.int32) if len(tokens) <= longest else None

    rows = [row for row, tokens in enumerate(prompts) if not isinstance(tokens, str)][:_SAMPLED]
    added = [len(render(row, "")) - len(prompts[row]) for row in rows]
    excess = max(added, default=0) + limits.response
    return dict(retell=retell, retold_excess=excess)


_SAMPLED = 64  # rows of which it is looked how much a template adds


def _more_tokens(examples: Sequence[Example], tokenizer, other, longest: int) -> int:
    """By how many tokens another tokenizer may cut a response longer, and a quarter.

    As of the texts of the first rows; what is longer is not read.
    """
    prompts = (e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"] for e in examples)
    pairs = itertools.islice(zip(prompts, examples, strict=True), _SAMPLED)
    texts = [text for prompt, e in pairs for text in (prompt, e.response) if text]
    ours, theirs = (
        [len(ids) for ids in each(texts, add_special_tokens=False)["input_ids"]] if texts else []
        for each in (tokenizer, other)
    )
    ratio = max(
        (more / max(number, 1) for more, number in zip(theirs, ours, strict=True)), default=1
    )
    return math.ceil(longest * max(1.25 * ratio - 1, 0.25))


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Tokens of prompts and responses at most, characters of the longest, ids, and the key."""

    prompt: int
    response: int
    longest_piece: int
    ids: int
    keep_truncated: bool


def _longest_piece(tokenizer) -> int:
    # Holds wherever no token stands for more characters than its own: not for tokenizers that
    # make one unknown token of a long word, whose prompt would say nothing either.
    return max(map(len, tokenizer.get_vocab()))


# Token ids, or the reason why a text has none that could be used.
_Encoded = np.ndarray | str


def _arrays(encoded: list[_Encoded], kept: list[int]) -> list[np.ndarray]:
    return [tokens for i in kept if isinstance(tokens := encoded[i], np.ndarray)]


def _encode_prompts(
    examples: Sequence[Example],
    tokenizer,
    chat: Chat,
    limits: _Limits,
    notes: list[tuple[str, str]],
    fields: tuple[str, ...] = (),
    section: str = "",
) -> list[_Encoded]:
    too_long = f"prompts longer than {limits.prompt} tokens"
    most_characters = limits.prompt * limits.longest_piece
    # A curriculum repeats its problems: each distinct prompt is rendered and encoded once.
    named = [{name: _FIELDS[name](example) or "" for name in fields} for example in examples]
    keys = [json.dumps([e.prompt, texts]) for e, texts in zip(examples, named, strict=True)]
    encoded: dict[str, _Encoded] = {}
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
    plain = not tokenizer.chat_template
    ids = chat.encode(list(texts.values()), add_special_tokens=plain)
    for key, tokens in zip(texts, ids, strict=True):
        if not tokens:
            encoded[key] = "prompts without a token"
        elif max(tokens) >= limits.ids:
            encoded[key] = _UNKNOWN.format("prompts")
        elif plain and len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
            encoded[key] = "prompts with two begin tokens, of data.prompt_template and tokenizer"
        else:
            fits = len(tokens) <= limits.prompt
            encoded[key] = np.array(tokens, np.int32) if fits else too_long
    return [encoded[key] for key in keys]


_UNKNOWN = "{} with tokens that the models have no embedding for"
_SPELLED = "{} that spell special tokens, which are text there (data.special_tokens)"


def _where(asked: Sequence[bool], encoded: Sequence[_Encoded]) -> list[_Encoded]:
    """What a teacher reads in place of the prompts; nothing where it is not asked."""
    read = iter(
        f"{tokens} (what the teacher reads)" if isinstance(tokens, str) else tokens
        for tokens in encoded
    )
    return [next(read) if is_asked else np.zeros(0, np.int32) for is_asked in asked]


def _encode_responses(
    examples: Sequence[Example],
    tokenizer,
    chat: Chat,
    limits: _Limits,
    notes: list[tuple[str, str]],
) -> list[_Encoded]:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token, so responses could never end; set one")
    too_long = f"responses longer than {limits.response} tokens with the end token"
    end = response_end(tokenizer)
    endings = tuple(tokenizer.convert_ids_to_tokens([end, tokenizer.eos_token_id]))
    encoded: dict[int, _Encoded] = {}
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


def _nothing_left(total: int, dropped: Mapping[str, Dropped]) -> str:
    reasons = describe_drops(dropped)
    remedies = {
        "prompts longer": "raise policy.max_total_sequence_length",
        "responses longer": "raise distillation.generate_strategy.max_length",
        "without the {": "set data.response_column or data.answer_column, or leave the field out",
        "without a response": "set data.response_column to where the responses are",
        "rendered already": "set data.chat_template=none and data.special_tokens=control",
        "beside data.system_prompt": "leave data.system_prompt empty",
        "two begin tokens": "leave the begin token out of data.prompt_template",
        "no embedding": "take added tokens out of tokenizer.json, or give the models rows for them",
        "leaves out": "rename the roles as the model's chat template has them",
    }
    advice = [remedy for reason, remedy in remedies.items() if reason in reasons]
    return (
        f"none of {total} rows can be used: {reasons or 'the split is empty'}; "
        f"{' and '.join(advice) or 'check data.path'}"
    )
