"""Responses token by token: how far student and teacher are apart, and what the teacher would say.

Written at every evaluation of the student as `rollouts/ROLE.json` in the run's folder: the first
held-out prompts, and the diagnosis of all of them. `report.html` shows both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.base import processes
from distill.base.files import write_atomically
from distill.data.base import DatasetInterface, Example
from distill.data.prompts import Prompts
from distill.data.tokenizer import Vocabulary
from distill.evaluation.diagnosis import diagnose, rounded
from distill.evaluation.evaluator import Responses
from distill.evaluation.token_values import num_shown

FOLDER = "rollouts"
TOP = 5  # choices of the teacher that are written for every token
_LONGEST_QUESTION = 200  # characters, where it only names a prompt
_UNFINISHED = "\ufffd"  # how tokenizers show a part of a character


class RolloutRecorder:
    """Writes what both models think of every token of a model's responses to held-out prompts.

    Only the first of several processes writes.
    """

    def __init__(
        self, workdir: Path, dataset: DatasetInterface, prompts: Prompts, vocabulary: Vocabulary
    ):
        self._folder, self._dataset = workdir / FOLDER, dataset
        self._prompts, self._vocabulary = prompts, vocabulary

    def __call__(self, role: str, step: int, responses: Responses) -> None:
        """Writes the first of the responses, whose tokens were read, and the diagnosis of all.

        Without a teacher that was read, only the model's own probabilities are known.
        """
        if not processes.is_first():
            return
        rollout, values = responses.rollout, responses.values
        most = num_shown(rollout.lengths_b)
        shown = [self._response(i, responses, values[i]) for i in sorted(values) if i < most]
        listed = {
            token for response in shown for top in response.get("top", ()) for token, *_ in top
        }
        diagnosis, has_teacher = None, any("log_p" in each for each in values.values())
        if has_teacher:
            diagnosis = diagnose(values, rollout, responses.correct, self._vocabulary)
            for prompt in diagnosis["prompts"]["largest"]:
                example = self._dataset[int(self._prompts.rows[prompt["number"]])]
                prompt["question"] = _question(example)[:_LONGEST_QUESTION]
        record = dict(
            role=role,
            step=step,
            responses_in_all=len(responses.texts),
            has_teacher=has_teacher,
            responses=shown,
            texts={token: self._text([token]) for token in sorted(listed)},
            diagnosis=diagnosis,
        )
        self._folder.mkdir(exist_ok=True)
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
        write_atomically(self._folder / f"{role}.json", text + "\n")

    def _response(self, i: int, responses: Responses, values: dict[str, Any]) -> dict[str, Any]:
        example = self._dataset[int(self._prompts.rows[i])]
        tokens = responses.rollout.tokens_br[i, : responses.rollout.lengths_b[i]].tolist()
        names = ("log_q", "log_p", "divergence")
        of_tokens = {name: rounded(values[name]) for name in names if name in values}
        if "top_ids" in values:
            names = ("top_ids", "top_log_p", "top_log_q")
            choices = (rounded(values[name][:, :TOP]) for name in names)
            of_tokens["top"] = [list(zip(*top, strict=True)) for top in zip(*choices, strict=True)]
        return dict(
            id=example.id,
            question=_question(example),
            prompt=self._text(self._prompts.prompt_tokens[i].tolist()),
            expected=" or ".join(example.answers) or None,
            correct=responses.correct[i],
            stopped=bool(responses.rollout.stopped_b[i]),
            ids=tokens,
            tokens=pieces(self._text, tokens),
            **of_tokens,
        )

    def _text(self, tokens: list[int]) -> str:
        return str(self._vocabulary.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def pieces(decode: Callable[[list[int]], str], tokens: list[int]) -> list[str]:
    """Each token's part of the text; of those that share one character, the last has it."""
    texts, waiting = [], []
    for token in tokens:
        waiting.append(token)
        text = decode(waiting)
        if text.endswith(_UNFINISHED) and len(waiting) < 4:  # bytes of a character at most
            texts.append("")
        else:
            texts.append(text)
            waiting = []
    if waiting:
        texts[-1] = decode(waiting)
    return texts


def _question(example: Example) -> str:
    """The prompt without the chat template; of a conversation, what was said last."""
    prompt = example.prompt
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
