"""The environment of a config: what replies to the student's turns."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from distill.base.errors import UserError
from distill.base.registry import own_values
from distill.build.data import template_arguments
from distill.config.schema import Config
from distill.data.base import DatasetInterface, Example
from distill.data.chat import Chat, Refused
from distill.data.tokenizer import Vocabulary
from distill.evaluation.grading import Grader
from distill.rollout.environment import Dialogues, EnvironmentMaker, Message, get_environment, says
from distill.rollout.tools import Calculator, PythonTool, SelfCheck, compile_call

MakeDialogues = Callable[[np.ndarray], Dialogues]


def build_dialogues(
    config: Config,
    vocabulary: Vocabulary,
    dataset: DatasetInterface,
    cleanup: contextlib.ExitStack,
) -> MakeDialogues | None:
    """Dialogues for rows of the dataset; None where the config has no environment.

    Raises:
      UserError: the chat template does not write dialogues as they come.
    """
    section = config.environment
    if not section.name:
        return None
    tokenizer, data = vocabulary.tokenizer, config.data
    ends = tuple(tokenizer.convert_ids_to_tokens(list(vocabulary.end_ids)))
    chat = Chat(tokenizer, arguments=template_arguments(data), special_tokens=data.special_tokens)

    def write(messages: Sequence[Message]) -> np.ndarray:
        text = chat.reply(messages)
        # The end of the student's turn has been sampled.
        behind = next((text.removeprefix(end) for end in ends if text.startswith(end)), text)
        return np.array(chat.encode([behind], add_special_tokens=False)[0], np.int32)

    def read(tokens_t: np.ndarray) -> str:
        return str(tokenizer.decode(tokens_t.tolist(), skip_special_tokens=True))

    try:
        write(says("user", "?"))
    except Refused as refusal:
        raise UserError(f"environment.name={section.name} cannot write {refusal}") from None
    maker = _maker(config, dataset, cleanup)

    def begin(row_b: np.ndarray) -> Dialogues:
        return Dialogues(
            maker,
            row_b,
            [dataset[int(row)] for row in row_b],
            read=read,
            write=write,
            slow=getattr(getattr(maker, "func", maker), "slow", False),
            max_turns=section.max_turns,
            timeout=section.timeout,
            max_failures=section.max_failures,
        )

    return begin


def _maker(
    config: Config, dataset: DatasetInterface, cleanup: contextlib.ExitStack
) -> EnvironmentMaker:
    """What `environment.name` stands for."""
    if config.environment.name == "python_tool":
        call, calculator = compile_call(config.environment.call), Calculator()
        cleanup.callback(calculator.stop)
        return lambda example: PythonTool(call, calculator)
    if config.environment.name == "self_check":
        evaluation, alone = config.evaluation, threading.Lock()
        grader = cleanup.enter_context(Grader(evaluation.grading, evaluation.answer_timeout))

        def is_right(example: Example, response: str) -> bool | None:
            with alone:  # its counts are for one at a time
                return grader.grade(dataset, [example], [response])[0]

        return lambda example: SelfCheck(example, is_right)
    own = get_environment(config.environment.name)
    return functools.partial(own, **own_values(own, ("example",), config.plugin))
