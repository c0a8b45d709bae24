"""What teachers read in place of the student's prompts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.data.base import Example
from distill.data.chat import Chat, Refused
from distill.data.encoding import (
    FEEDBACK,
    FIELDS,
    Encoded,
    Limits,
    check_template,
    encode_prompts,
    longest_piece,
)
from distill.data.sequences import Sequences
from distill.data.tokenizer import Vocabulary


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


@dataclasses.dataclass(frozen=True)
class StudentPrompts:
    """What the student reads, and how it came about."""

    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    chat: Chat
    limits: Limits


@dataclasses.dataclass(frozen=True)
class View:
    """What one teacher reads.

    Attributes:
      asked: whether it is asked about each of the examples.
      encoded: its prompts; None: the student's.
      further: fields of `Prompts`, of what it reads beside them.
    """

    asked: Sequence[bool]
    encoded: list[Encoded] | None = None
    further: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def encode_view(teacher: TeacherPrompt, student: StudentPrompts) -> View:
    """What a teacher reads of the examples that it is asked about.

    Raises:
      UserError: its template names what examples do not have.
    """
    examples, limits, tokenizer = student.examples, student.limits, student.chat.tokenizer
    asked = [teacher.asks(example) for example in examples]
    if not teacher.differs:
        return View(asked)
    wanted, further = list(itertools.compress(examples, asked)), dict[str, Any]()
    own, ours = teacher.vocabulary, student.chat
    tokenizer_t = tokenizer if own is None else own.tokenizer
    chat = dataclasses.replace(
        ours,
        tokenizer=tokenizer_t,
        template=teacher.template or ours.template,
        system_prompt=teacher.system_prompt or ours.system_prompt,
        arguments={**(ours.arguments if own is None else {}), **teacher.arguments},
        section=teacher.section,
    )
    fields = check_template(teacher.section, chat.template, (*FIELDS, FEEDBACK))
    if FEEDBACK in fields:
        further = _retelling(examples, student.encoded, chat, limits, fields)
        chat, fields = ours, ()
    if own is not None:
        more = _more_tokens(wanted, tokenizer, tokenizer_t, limits.response)
        further = dict(recut=teacher.recut, recut_excess=more)
        longest = longest_piece(tokenizer_t)
        limits = dataclasses.replace(limits, longest_piece=longest, ids=own.size)
    encoded = encode_prompts(wanted, chat, limits, [], fields, teacher.section)
    return View(asked, _where(asked, encoded), further)


def _where(asked: Sequence[bool], encoded: Sequence[Encoded]) -> list[Encoded]:
    """What a teacher reads in place of the prompts; nothing where it is not asked."""
    read = iter(
        f"{tokens} (what the teacher reads)" if isinstance(tokens, str) else tokens
        for tokens in encoded
    )
    return [next(read) if is_asked else np.zeros(0, np.int32) for is_asked in asked]


def _retelling(
    examples: Sequence[Example],
    prompts: Sequence[Encoded],
    chat: Chat,
    limits: Limits,
    fields: tuple[str, ...],
) -> dict[str, Any]:
    """`Prompts.retell` and `retold_excess`: as long as any response, and what the template adds."""
    tokenizer = chat.tokenizer
    plain = not tokenizer.chat_template

    def render(row: int, feedback: str) -> list[int]:
        example = examples[row]
        texts = {name: FIELDS[name](example) or "" for name in fields if name != FEEDBACK}
        text = chat.render(example.prompt, {**texts, FEEDBACK: feedback})
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
