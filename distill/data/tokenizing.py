"""From a dataset's texts to token prompts and responses within the length limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.base.errors import UserError
from distill.data.base import DatasetInterface, Dropped, Example, count_drops, examples_of
from distill.data.chat import Chat
from distill.data.encoding import (
    Encoded,
    Limits,
    arrays,
    check_template,
    encode_prompts,
    encode_responses,
    longest_piece,
)
from distill.data.messages import prompt_key
from distill.data.prompts import Prompts, describe_drops
from distill.data.teacher_prompts import StudentPrompts, TeacherPrompt, View, encode_view
from distill.data.tokenizer import padding, vocabulary_size


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

    Texts that cannot fit by their number of characters are dropped before they are tokenised. A
    chat template renders the prompt as a user's message (a list of messages as it is), followed by
    the opening of the response. Without one the prompt is plain text. See `Chat` for the rest.

    Args:
        max_prompt_length: most tokens of a prompt, with everything the chat template adds.
        max_response_length: most tokens of a response, EOS included; used with `needs_responses`.
        needs_responses: tokenise the responses, and drop rows without one.
        keep_truncated: whether responses that were cut off are kept, without an end token.
        vocab_size: ids that the models know, where those are fewer than the tokenizer's.
        teachers: what each is asked about, and how its prompts differ from the student's.

    Raises:
        UserError: bad template, a list of messages without a chat template, or nothing is left.
    """
    template = prompt_template or dataset.get_prompt_template()
    check_template("data", template)
    chat = Chat(tokenizer, system_prompt, template, template_arguments or {}, special_tokens)
    examples = examples_of(dataset)
    limits = Limits(
        max_prompt_length,
        max_response_length,
        longest_piece(tokenizer),
        vocab_size or vocabulary_size(tokenizer),
        keep_truncated,
    )
    notes: list[tuple[str, str]] = []
    prompts = encode_prompts(examples, chat, limits, notes)
    student = StudentPrompts(examples, prompts, chat, limits)
    views = [encode_view(teacher, student) for teacher in teachers]
    responses = None
    if needs_responses:
        responses = encode_responses(examples, chat, limits, notes)
    made = [prompts, *(view.encoded for view in views), responses]
    kept, misfits = _fitting(examples, [column for column in made if column is not None])
    dropped = {**dataset.bad_rows, **misfits}
    if not kept:
        raise UserError(_nothing_left(len(examples), dropped))

    def those_of(view: View | None) -> Prompts:
        own = kept if view is None else [i for i in kept if view.asked[i]]
        read = None if view is None else view.encoded
        return Prompts(
            rows=np.array(own, np.int64),
            prompt_tokens=arrays(prompts, own),
            response_tokens=None if responses is None else arrays(responses, own),
            dropped=dropped,
            pad_id=padding(tokenizer, limits.ids),
            noted=count_drops(notes),
            keys=tuple(prompt_key(examples[i].prompt) for i in own),
            view_tokens=None if read is None else arrays(read, own),
            **(view.further if view else {}),
        )

    if len(views) > 1:
        return dataclasses.replace(those_of(None), parts=tuple(map(those_of, views)))
    return those_of(dataclasses.replace(views[0], asked=[True] * len(examples)) if views else None)


def _fitting(
    examples: Sequence[Example], columns: Sequence[Sequence[Encoded]]
) -> tuple[list[int], dict[str, Dropped]]:
    """The rows that have tokens in all columns, and the others by the first reason for it."""
    reasons = [
        next((each for each in of_row if isinstance(each, str)), None)
        for of_row in zip(*columns, strict=True)
    ]
    pairs = zip(reasons, examples, strict=True)
    dropped = count_drops((reason, example.id) for reason, example in pairs if reason)
    return [i for i, reason in enumerate(reasons) if reason is None], dropped


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
