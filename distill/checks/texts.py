"""Tokenizers, chat templates and ends of responses: what can be seen in a few prompts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.base.errors import UserError
from distill.build.data import template_arguments
from distill.build.session import Session
from distill.checks import Problem
from distill.data.chat import Refused, render_chat
from distill.data.messages import Prompt
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.data.tokenizer import closing_token, load_tokenizer, response_end
from distill.models.checkpoints.hub import tokenizer_folder
from distill.teachers.alignment import Alignment

SAMPLED_PROMPTS = 8
MOST_LEFT_OUT = 0.5  # of the tokens in texts, by another tokenizer
ENDING = 3  # tokens with which a chat template opens a response


def check_tokenizers(session: Session) -> str:
    """Student and teacher cut the same rendered prompts into the same tokens."""
    texts = [*_rendered_prompts(session), *_texts(session)]
    found = _compare_with_transformers(session, texts)
    if not session.teacher_folders:
        return f"no teacher's tokenizer to compare with{found}"
    ours = session.vocabulary.tokenizer(texts, add_special_tokens=False)["input_ids"]
    templates: dict[str, None] = {}
    for name, folder in session.teacher_folders.items():
        teacher = f"teacher {name}".strip()
        if alignment := session.alignments.get(name):
            found += _compare_cuts(session, teacher, alignment)
            continue
        theirs = _tokenizer_of(folder, "none")(texts, add_special_tokens=False)["input_ids"]
        for text, mine, other in zip(texts, ours, theirs, strict=True):
            if mine != other:
                raise Problem(
                    f"student and {teacher} make different tokens of {_short(text)}, "
                    f"{_difference(mine, other)}: their merges or normalisation differ; pick a "
                    "pair from one model family"
                )
        if session.vocabulary.tokenizer.chat_template:
            templates[_compare_templates(session, teacher, folder)] = None
    alike = len(session.teacher_folders) - len(session.alignments)
    if not alike:
        return found.removeprefix("; ")
    all_of_them = "both" if alike == 1 else "all models"
    return f"{len(ours)} texts are the same tokens for {all_of_them}{found}{''.join(templates)}"


def _compare_cuts(session: Session, teacher: str, alignment: Alignment) -> str:
    """How a teacher with another tokenizer cuts the data's texts."""
    texts = session.vocabulary.tokenizer(_texts(session), add_special_tokens=False)["input_ids"]
    sequences = Sequences.of_tokens(texts)
    view = alignment.recut(sequences, np.zeros(len(texts), int), np.full(len(texts), 2**31))
    alike, spans, left_out = alignment.shares(int(sequences.lengths_b.sum()), view)
    if left_out > MOST_LEFT_OUT:
        raise Problem(
            f"the {teacher}'s tokenizer does not give back the bytes of {left_out:.0%} of the "
            "tokens in the data's texts: it changes what it reads; take another teacher"
        )
    return (
        f"; the {teacher} has another tokenizer, {alignment.teacher.size} ids of which "
        f"{int((alignment.pairs_v >= 0).sum())} are strings of the student's; of the tokens in the "
        f"data's texts {alike:.0%} are cut alike, {spans:.0%} in spans, {left_out:.0%} left out"
    )


def _compare_with_transformers(session: Session, texts: list[str]) -> str:
    """A warning where those who load the student otherwise would see other tokens."""
    # Imported late: with it comes torch, where that is installed.
    from transformers import AutoTokenizer

    try:
        usual = AutoTokenizer.from_pretrained(
            tokenizer_folder(session.student_folder),
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception:  # what it can't load it doesn't cut otherwise either
        return ""
    ours, theirs = (
        tokenizer(texts, add_special_tokens=False)["input_ids"]
        for tokenizer in (session.vocabulary.tokenizer, usual)
    )
    if ours == theirs:
        return ""
    at = next(i for i, ids in enumerate(ours) if ids != theirs[i])
    return (
        f"; warning: AutoTokenizer of transformers cuts {_short(texts[at])} otherwise than "
        "tokenizer.json, by which this run goes: load the student with PreTrainedTokenizerFast"
    )


def _compare_templates(session: Session, teacher: str, folder: Path) -> str:
    """A warning where a teacher knows prompts in another form: it may be wanted."""
    tokenizer = session.vocabulary.tokenizer
    try:
        ours, theirs = (_in_template(session, t) for t in (tokenizer, _tokenizer_of(folder)))
    except (Refused, UserError) as error:
        return f"; warning: the {teacher}'s chat template cannot be compared ({error})"
    if ours == theirs:
        return ", with the same chat template"
    return (
        f"; warning: the {teacher}'s chat template renders them otherwise, and it will see the "
        f"student's ({_difference(ours[0], theirs[0])}): set data.system_prompt, or use a student "
        "with the teacher's template"
    )


def _tokenizer_of(folder: Path, chat_template: str = ""):
    return load_tokenizer(tokenizer_folder(folder), chat_template)


def check_template(session: Session) -> str:
    """Prompts, the teacher's too, hold their problem's text and leave the response open."""
    own = session.vocabulary
    read = [(own, session.prompts, session.prompts.prompt_tokens)]
    read += [
        (alignment.teacher if alignment else own, each, each.view_tokens)
        for each, alignment in session.asked
        if each.view_tokens
    ]
    for vocabulary, row, tokens in ((each[0], *p) for each in read for p in _first_of(*each[1:])):
        tokenizer, ends = vocabulary.tokenizer, vocabulary.end_ids
        prompt = session.dataset[int(row)].prompt
        rendered = tokenizer.decode(tokens, skip_special_tokens=False)
        assert isinstance(rendered, str)  # a list is of several prompts
        text = _said(prompt)[-1]
        if _comparable(tokenizer, text) not in _comparable(tokenizer, rendered):
            raise Problem(
                f"the prompt {_short(text)} becomes {_short(rendered)}: the chat template or the "
                "tokenizer loses its text; check tokenizer_config.json, chat_template.jinja and "
                "data.prompt_template"
            )
        if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
            raise Problem(
                f"the prompt {_short(text)} begins with {tokenizer.bos_token!r} twice: the chat "
                "template writes it, and the tokenizer or the data once more"
            )
        if int(tokens[-1]) in ends:
            raise Problem(
                f"the prompt {_short(text)} ends with {tokenizer.decode([tokens[-1]])!r}, which "
                "ends a response before it has begun: the chat template ignores "
                "add_generation_prompt, or the tokenizer adds its end token to prompts"
            )
    return f"{len(_first_prompts(session))} prompts hold their text and leave the response open"


def check_view(session: Session) -> str:
    """What teachers read in place of the student's prompts, and whether both end alike."""
    parts = zip(session.teachers, session.asked, strict=True)
    return "; ".join(_view_of(session, f"teacher {name}".strip(), *part) for name, part in parts)


def _view_of(session: Session, teacher: str, prompts: Prompts, alignment: Alignment | None) -> str:
    tokenizer = session.vocabulary.tokenizer
    if prompts.view_tokens is None:
        return f"the {teacher} reads the student's prompts"
    pairs = list(zip(prompts.prompt_tokens, prompts.view_tokens, strict=True))[:SAMPLED_PROMPTS]
    tokenizers = tokenizer, alignment.teacher.tokenizer if alignment else tokenizer
    ours, theirs = (str(t.decode(each)) for t, each in zip(tokenizers, pairs[0], strict=True))
    found = f"the {teacher} reads {_short(theirs, 200)}, the student {_short(ours, 200)}"
    differ = sum(mine[-ENDING:].tolist() != other[-ENDING:].tolist() for mine, other in pairs)
    if tokenizer.chat_template and differ and alignment is None:
        found += (
            f"; warning: {differ} of {len(pairs)} end differently, so that the response begins in "
            "another place, such as inside or behind thinking: see the template_arguments"
        )
    return found


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
    closing = closing_token(tokenizer)
    found = f"responses end at {names}; "
    if closing is None:
        found += "the chat template puts no token behind them"
    else:
        found += f"those of the data with {tokenizer.decode([closing])!r}"
    for name, folder in session.teacher_folders.items():
        if alignment := session.alignments.get(name):
            other = alignment.teacher.tokenizer
            found += (
                f"; {tokenizer.decode([response_end(tokenizer)])!r} is to the "
                f"{f'teacher {name}'.strip()} what {other.decode([response_end(other)])!r} is"
            )
            continue
        theirs = closing_token(_tokenizer_of(folder))
        if theirs not in (None, response_end(tokenizer)):
            found += (
                f"; warning: the {f'teacher {name}'.strip()}'s chat template closes them with "
                f"{tokenizer.decode([theirs])!r}, so it expects that and no other end"
            )
    return found


def check_overlap(session: Session) -> str:
    """How many held-out prompts are trained on."""
    if session.validation is None:
        return "nothing is evaluated"
    trained, held_out = set(session.prompts.keys), session.evaluator.prompts.keys
    shared = sum(key in trained for key in held_out)
    found = f"{shared} of {len(held_out)} held-out prompts are trained on"
    return f"warning: {found}: accuracy on them says little" if shared else found


def _first_prompts(session: Session) -> list[tuple[int, np.ndarray]]:
    """Dataset row and tokens of the first prompts."""
    return _first_of(session.prompts, session.prompts.prompt_tokens)


def _first_of(prompts: Prompts, tokens: list[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    return list(zip(prompts.rows, tokens, strict=True))[:SAMPLED_PROMPTS]


def _said(prompt: Prompt) -> list[str]:
    """The texts of a prompt, what is asked last."""
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def _texts(session: Session) -> list[str]:
    """Prompts, and responses where the data has them: what both tokenizers must cut alike."""
    examples = [session.dataset[int(row)] for row, _ in _first_prompts(session)]
    prompts = [_said(example.prompt)[-1] for example in examples]
    return [*prompts, *(example.response for example in examples if example.response)]


def _rendered_prompts(session: Session) -> list[str]:
    """The prompts as the student reads them."""
    decode = session.vocabulary.tokenizer.decode
    return [str(decode(tokens, skip_special_tokens=False)) for _, tokens in _first_prompts(session)]


def _in_template(session: Session, tokenizer) -> list[str]:
    """Prompts as the tokenizer's chat template renders them."""
    if not tokenizer.chat_template:
        return [""]
    data = session.config.data
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    turns = [[*system, {"role": "user", "content": text}] for text in _texts(session)]
    return [render_chat(tokenizer, each, template_arguments(data)) for each in turns]


def _difference(ours: Sequence, theirs: Sequence) -> str:
    """Where two sequences begin to differ."""
    shorter = min(len(ours), len(theirs))
    at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
    window = slice(max(0, at - 10), at + 20)
    return f"from position {at} on: {ours[window]!r} and {theirs[window]!r}"


def _comparable(tokenizer, text: str) -> str:
    """The text as the tokenizer normalises it, without white space however it is spelt."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    normalised = normalizer.normalize_str(text) if normalizer else text
    return "".join(unicodedata.normalize("NFKC", normalised).replace("\u2581", " ").split())


def _short(text: str, size: int = 60) -> str:
    return repr(text if len(text) <= size else text[: size - 3] + "...")
