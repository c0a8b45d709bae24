"""From prompts to the texts that a chat template makes of them, and from texts to token ids.

The data's texts reach the model whole, and as text: what spells a special token in them is no
control token, or data could end a turn and speak for the other side.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from distill.base.errors import UserError
from distill.data.messages import Prompt

# A special token that is text: its id between noncharacters of Unicode, which no text holds.
_HIDDEN = "\ufdd0{}\ufdd1"
_HIDDEN_PATTERN = "\ufdd0([0-9]+)\ufdd1"
_PROBE = "\ufdd2"


class Refused(Exception):
    """A prompt that cannot be put before the model; the text is a reason that rows share."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """How prompts and responses become tokens.

    Attributes:
        tokenizer: a transformers fast tokenizer; without a chat template prompts are plain text.
        system_prompt: put before the prompt; '' is none.
        template: text with one '{problem}' that wraps the prompt (the last message of a list).
        arguments: further variables of the chat template.
        special_tokens: what those are that the data spells, 'text' or 'control' tokens.
        section: of the config, which errors name.

    Raises:
        UserError: the chat template has no such variable.
    """

    tokenizer: Any
    system_prompt: str = ""
    template: str = "{problem}"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    special_tokens: str = "text"
    section: str = "data"

    def __post_init__(self) -> None:
        known = self.tokenizer.chat_template or ""
        if unknown := [name for name in self.arguments if name not in known]:
            raise UserError(
                f"{self.section}.template_arguments sets {unknown[0]!r}, which the model's chat "
                "template does not use: leave it out"
            )

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """Of the special tokens."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: id for id, token in added if token.special}

    @functools.cached_property
    def _special(self) -> str:
        """A pattern that finds any of them."""
        return "|".join(sorted(map(re.escape, self._ids), key=len, reverse=True)) or "(?!)"

    def protected(self, text: str) -> str:
        """The text with its special tokens hidden, which `encode` takes for text."""
        if self.special_tokens != "text":
            return text
        return re.sub(self._special, lambda found: _HIDDEN.format(self._ids[found[0]]), text)

    def restored(self, text: str) -> str:
        """The text whose special tokens were hidden."""
        contents = self.tokenizer.added_tokens_decoder
        return re.sub(_HIDDEN_PATTERN, lambda found: contents[int(found[1])].content, text)

    def render(self, prompt: Prompt, fields: Mapping[str, str] | None = None) -> str:
        """The protected text of a prompt, with the opening of the response.

        `fields`: texts of the example that the template names beside the problem.

        Raises:
            Refused: the chat template refuses the prompt or loses a part of it.
            UserError: a list of messages, but no chat template.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # As JSON: a message may hold more texts than its content.
        turns = json.loads(self.protected(json.dumps(turns, ensure_ascii=False)))
        texts = {name: self.protected(text) for name, text in (fields or {}).items()}
        turns = wrap_prompt(turns, self.template, texts)
        if self.system_prompt:
            if any(turn["role"] == "system" for turn in turns):
                raise Refused(f"prompts with a system message, beside {self.section}.system_prompt")
            turns = [{"role": "system", "content": self.system_prompt}, *turns]
        if not self.tokenizer.chat_template:
            return _plain_text(turns)
        if isinstance(prompt, str) and prompt.lstrip().startswith(self._openings):
            raise Refused("prompts that a chat template has rendered already")
        text = render_chat(self.tokenizer, turns, self.arguments)
        if role := _left_out(turns, text):
            raise Refused(f"prompts whose message by {role!r} the chat template leaves out")
        return text

    def reply(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The protected text behind a response: messages, and the opening of the next response.

        Raises:
            Refused: the chat template refuses the messages, or writes an earlier response in
                another way than it was begun.
        """
        turns = json.loads(self.protected(json.dumps(list(messages), ensure_ascii=False)))
        if not self.tokenizer.chat_template:
            return "".join(turn["content"] for turn in turns)
        begun = [{"role": "user", "content": _PROBE}]
        opening = render_chat(self.tokenizer, begun, self.arguments)
        said = {"role": "assistant", "content": _PROBE}
        text = render_chat(self.tokenizer, [*begun, said, *turns], self.arguments)
        if not text.startswith(opening + _PROBE):
            at = len(os.path.commonprefix([text, opening + _PROBE]))
            raise Refused(
                f"dialogues, in which the chat template writes {text[at : at + 20]!r} where a "
                f"response was begun with {opening[at : at + 20]!r}"
            )
        return text.removeprefix(opening + _PROBE)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of protected texts."""
        hiding = [bool(re.search(_HIDDEN_PATTERN, text)) for text in texts]
        options = dict(add_special_tokens=add_special_tokens)
        usual = [text for text, hides in zip(texts, hiding, strict=True) if not hides]
        others = [self._swapped(text) for text, hides in zip(texts, hiding, strict=True) if hides]
        usual_ids = iter(self.tokenizer(usual, **options)["input_ids"] if usual else [])
        other_ids = iter(self._literal.encode_batch(others, **options) if others else [])
        return [next(other_ids).ids if hides else next(usual_ids) for hides in hiding]

    def _swapped(self, text: str) -> str:
        """The text for `_literal`: control tokens by their ids, and what was hidden as it was."""
        return re.sub(
            f"{_HIDDEN_PATTERN}|{self._special}",
            lambda found: self.restored(found[0]) if found[1] else self.protected(found[0]),
            text,
        )

    @functools.cached_property
    def _literal(self) -> Tokenizer:
        """The tokenizer with its special tokens renamed, so that no text spells one."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {content: _HIDDEN.format(id) for content, id in self._ids.items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(word, word): id for word, id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(state))

    @functools.cached_property
    def _openings(self) -> tuple[str, ...]:
        """With which of these a text begins that the chat template has rendered."""
        try:
            turns = [{"role": "user", "content": _PROBE}]
            opening = render_chat(self.tokenizer, turns, self.arguments).partition(_PROBE)[0]
        except Refused:
            return ()
        begin = self.tokenizer.bos_token or ""
        texts = [opening, opening.removeprefix(begin), *re.findall(self._special, opening)]
        return tuple({text.strip() for text in texts} - {"", begin})


def render_chat(tokenizer, turns: list[dict[str, Any]], arguments: Mapping[str, Any]) -> str:
    """The messages in the chat template, with the opening of the response.

    Raises:
        Refused: the template has an error or refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, **arguments
        )
    except Exception as error:  # besides Jinja's own, whatever a template's code comes to
        raise Refused(f"prompts that the chat template refuses: {error}") from None


def wrap_prompt(prompt: Prompt, template: str, fields: Mapping[str, str] | None = None) -> Any:
    """The prompt, or the last of its messages, in the place of '{problem}' in the template.

    Other `fields` of the example stand in for their names likewise.
    """
    # Not str.format: LaTeX in templates is full of braces.
    if isinstance(prompt, str):
        texts = {"problem": prompt, **(fields or {})}
        names = "|".join(texts)
        return re.sub(rf"\{{({names})\}}", lambda found: texts[found[1]], template)
    wrapped = wrap_prompt(prompt[-1]["content"], template, fields)
    return [*prompt[:-1], {**prompt[-1], "content": wrapped}]


def _left_out(turns: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """Who said what is not in the text, or not as often as it was said."""
    seen: collections.Counter[str] = collections.Counter()
    for turn in turns:
        # Templates leave out what was thought before earlier responses.
        said = turn["content"].rpartition("</think>")[2] if turn["role"] == "assistant" else ""
        said = "".join((said or turn["content"]).split())
        seen[said] += 1
        if said and "".join(text.split()).count(said) < seen[said]:
            return turn["role"]
    return None


def _plain_text(turns: list[dict[str, Any]]) -> str:
    system, user = turns[:-1], turns[-1]
    if len(system) > 1 or any(turn["role"] != "system" for turn in system):
        raise UserError(
            "the dataset's prompts are lists of chat messages, but the tokenizer has no chat "
            "template: use an instruction-tuned model's tokenizer or prompts of plain text"
        )
    return "\n\n".join(turn["content"] for turn in [*system, user])
