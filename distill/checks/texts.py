"""Tokenizers, chat templates and ends of responses: what can be seen in a few prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.build.session import Session
from distill.checks.problem import Problem
from distill.data.tokenizer import load_tokenizer

SAMPLED_PROMPTS = 8


def check_tokenizers(session: Session) -> str:
    """Student and teacher cut the same prompts into the same tokens, template included."""
    if session.teacher_folder is None:
        return "no teacher's tokenizer to compare with"
    texts = _texts(session)
    tokenizers = session.vocabulary.tokenizer, load_tokenizer(session.teacher_folder)
    ours, theirs = (
        tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers
    )
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        if mine != other:
            raise Problem(
                f"student and teacher make different tokens of {_short(text)}, "
                f"{_difference(mine, other)}: their merges or normalisation differ; pick a pair "
                "from one model family"
            )
    if not session.vocabulary.tokenizer.chat_template:
        return f"{len(texts)} texts are the same tokens for both"
    return (
        f"{len(texts)} texts are the same tokens for both{_compare_templates(session, tokenizers)}"
    )


def _compare_templates(session: Session, tokenizers) -> str:
    """A warning where the teacher knows prompts in another form: it may be wanted."""
    ours, theirs = (_rendered(session, tokenizer) for tokenizer in tokenizers)
    if ours == theirs:
        return ", with the same chat template"
    return (
        "; warning: the teacher's chat template renders them otherwise, and it will see the "
        f"student's ({_difference(ours[0], theirs[0])}): set data.system_prompt, or use a student "
        "with the teacher's template"
    )


def check_template(session: Session) -> str:
    """Prompts hold their problem's text and leave the response open."""
    tokenizer, ends = session.vocabulary.tokenizer, session.vocabulary.end_ids
    for row, tokens in _first_prompts(session):
        prompt = session.dataset[int(row)].prompt
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        rendered = tokenizer.decode(tokens, skip_special_tokens=False)
        assert isinstance(rendered, str)  # a list is of several prompts
        if _squeezed(text) not in _squeezed(rendered):
            raise Problem(
                f"the prompt {_short(text)} becomes {_short(rendered)}: the chat template or the "
                "tokenizer loses its text; check tokenizer_config.json, chat_template.jinja and "
                "data.prompt_template"
            )
        if int(tokens[-1]) in ends:
            raise Problem(
                f"the prompt {_short(text)} ends with {tokenizer.decode([tokens[-1]])!r}, which "
                "ends a response before it has begun: the chat template ignores "
                "add_generation_prompt, or the tokenizer adds its end token to prompts"
            )
    return f"{len(_first_prompts(session))} prompts hold their text and leave the response open"


def check_end(session: Session) -> str:
    """The token with which the chat template closes a response ends one here."""
    tokenizer, ends = session.vocabulary.tokenizer, session.vocabulary.end_ids
    beyond = [end for end in ends if not 0 <= end < session.vocabulary.size]
    if beyond:
        raise Problem(
            f"the end-of-response id {beyond[0]} is not in the vocabulary of "
            f"{session.vocabulary.size}, so it is never sampled: correct eos_token_id in "
            "generation_config.json"
        )
    names = ", ".join(repr(tokenizer.decode([end])) for end in ends)
    closing = _closing_token(tokenizer)
    if closing is None:
        return f"responses end at {names}; the chat template puts no token behind them"
    if closing not in ends:
        raise Problem(
            f"the chat template closes a response with {tokenizer.decode([closing])!r} (id "
            f"{closing}), but responses end only at {names}: they would run to max_length; add "
            f"{closing} to eos_token_id in generation_config.json"
        )
    return f"responses end at {names}, as the chat template closes them"


def _closing_token(tokenizer) -> int | None:
    """First special token that the template puts behind a response; None if there is none."""
    if not tokenizer.chat_template:
        return None
    response = "R7esponse"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": response}]
    _, _, tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(response)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def _first_prompts(session: Session) -> list[tuple[int, np.ndarray]]:
    """Dataset row and tokens of the first prompts."""
    prompts = session.prompts
    return list(zip(prompts.rows, prompts.prompt_tokens, strict=True))[:SAMPLED_PROMPTS]


def _texts(session: Session) -> list[str]:
    """Prompts, and responses where the data has them: what both tokenizers must cut alike."""
    examples = [session.dataset[int(row)] for row, _ in _first_prompts(session)]
    prompts = [e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"] for e in examples]
    return [*prompts, *(example.response for example in examples if example.response)]


def _rendered(session: Session, tokenizer) -> list[str]:
    """Prompts as the tokenizer's chat template renders them."""
    if not tokenizer.chat_template:
        return [""]
    system_prompt = session.config.data.system_prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns = [[*system, {"role": "user", "content": text}] for text in _texts(session)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _difference(ours: Sequence, theirs: Sequence) -> str:
    """Where two sequences begin to differ."""
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    window = slice(max(0, at - 10), at + 20)
    return f"from position {at} on: {ours[window]!r} and {theirs[window]!r}"


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _short(text: str, size: int = 60) -> str:
    return repr(text if len(text) <= size else text[: size - 3] + "...")
