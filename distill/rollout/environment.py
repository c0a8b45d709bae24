"""Environments reply to the student's turns: tools, feedback, games.

    @register_environment("guess")
    class Guess(Environment):
        def __init__(self, example):
            self.number = int(example.answer)

        def step(self, response):
            if response.strip() == str(self.number):
                return Reply(reward=1.0)
            return Reply(says("user", "no, guess again"))

`environment.name=guess` then makes every rollout a dialogue with one. What the environment says is
read by student and teacher, and trained on by nobody.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.base.errors import RunStopped
from distill.base.registry import Registry, describe
from distill.config.method import ENVIRONMENTS
from distill.data.base import Example

Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What an environment does after a turn.

    Attributes:
      messages: what it says, {'role', 'content'} each; none ends the dialogue.
      reward: of the turn, finite; a dialogue's is the sum.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0


def says(role: str, content: str) -> tuple[Message, ...]:
    """One message, as `Reply` takes it."""
    return ({"role": role, "content": content},)


class Environment(abc.ABC):
    """The other side of one dialogue, made from the example whose prompt begins it.

    Attributes:
      slow: its replies are not waited for while other dialogues can go on. When a reply comes may
        then decide how sums are rounded; else, nothing depends on time.
    """

    slow: bool = False

    @abc.abstractmethod
    def step(self, response: str) -> Reply:
        """Replies to the student's turn, a text without special tokens; in a thread of its own."""


EnvironmentMaker = Callable[[Example], Environment]
_ENVIRONMENTS = Registry(
    "environment.name",
    "distill.rollout.environment.register_environment",
    dict.fromkeys(ENVIRONMENTS, "distill.rollout.tools"),
)


def register_environment(name: str) -> Callable[[EnvironmentMaker], EnvironmentMaker]:
    """Decorator: makes what builds an `Environment` from an example available by name.

    Further parameters with defaults are keys of the config: `plugin.NAME`. UserError when the name
    is taken.
    """
    return _ENVIRONMENTS.register(name, takes=("example",))


def get_environment(name: str) -> EnvironmentMaker:
    """What was registered under `name`; UserError when there is nothing."""
    return _ENVIRONMENTS.get(name)


class Dialogues:
    """`sampling.request.Turns` of one request: an environment for every row.

    One that raises, says what is no reply or takes too long ends its dialogue and is counted. Of
    several processes, the first one has the dialogues.

    Args:
      make: of an example.
      row_b: of the dataset.
      examples: of these rows.
      read: a turn's text, of its tokens.
      write: the tokens of messages, and of the opening of the next turn.
      slow: see `Environment`; the rest is as in the config's section.
    """

    def __init__(
        self,
        make: EnvironmentMaker,
        row_b: np.ndarray,
        examples: Sequence[Example],
        *,
        read: Callable[[np.ndarray], str],
        write: Callable[[Sequence[Message]], np.ndarray],
        slow: bool = False,
        max_turns: int,
        timeout: float,
        max_failures: float,
    ):
        self.row_b, self._examples = row_b, examples
        self._make, self._read, self._write = make, read, write
        self._slow = slow
        self._max_turns, self._timeout, self._max_failures = max_turns, timeout, max_failures
        self._environments: dict[int, list[Environment]] = {}  # none until the first turn has ended
        self._due: dict[int, float] = {}  # rows that are asked about, and until when
        self._replies: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._failures: dict[int, str] = {}  # by row
        self._alone = threading.Lock()  # what rows share, of those that have threads of their own
        self.turns_b = np.zeros(len(examples), np.int32)
        self.reward_b = np.zeros(len(examples), np.float32)

    def ask(self, row: int, tokens_t: np.ndarray) -> None:
        """See `Turns.ask`."""
        self._due[row] = time.monotonic() + self._timeout
        self._start_step(row, tokens_t, self._replies)

    def begin(self, row: int) -> None:
        """See `Turns.begin`."""
        with self._alone:
            self._environments.pop(row, None)
            self._failures.pop(row, None)
        self.turns_b[row], self.reward_b[row] = 0, 0.0

    def reply(self, row: int, tokens_t: np.ndarray) -> np.ndarray | None:
        """See `Turns.reply`; raises what `replies` does."""
        replies: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        with self._alone:
            self._start_step(row, tokens_t, replies)
        try:
            _, reply = replies.get(timeout=self._timeout)
        except queue.Empty:
            with self._alone:
                self._fail_late(row)
            return None
        with self._alone:
            return self._taken(row, reply)

    def replies(self, wait: bool) -> Iterable[tuple[int, np.ndarray | None]]:
        """See `Turns.replies`; in the order of the rows, as far as they are waited for.

        Raises:
          RunStopped: too many environments fail.
        """
        came: dict[int, np.ndarray | None] = {}
        while self._due:
            waits = not self._slow or (wait and not came)
            patience = max(min(self._due.values()) - time.monotonic(), 0.0)
            try:
                row, reply = self._replies.get(timeout=patience if waits else 0.0)
            except queue.Empty:
                for row in [row for row, due in self._due.items() if due <= time.monotonic()]:
                    del self._due[row]
                    self._fail_late(row)
                    came[row] = None
                if not waits:
                    break
                continue
            if self._due.pop(row, None) is not None:  # else it was given up
                came[row] = self._taken(row, reply)
        return sorted(came.items(), key=lambda item: item[0])

    def measured(self) -> dict[str, float]:
        """Numbers about the dialogues, by metric name."""
        return {
            "environment/turns": float(self.turns_b.mean()),
            "environment/reward": float(self.reward_b.mean()),
            "environment/failures": len(self._failures) / len(self._examples),
        }

    def outcome(self) -> dict[str, np.ndarray]:
        """What has come of the dialogues, which `take_outcome` in another process takes."""
        failed_b = np.isin(np.arange(len(self._examples)), list(self._failures))
        return dict(turns_b=self.turns_b, reward_b=self.reward_b, failed_b=failed_b)

    def take_outcome(
        self, *, turns_b: np.ndarray, reward_b: np.ndarray, failed_b: np.ndarray
    ) -> None:
        self.turns_b, self.reward_b = turns_b, reward_b
        self._failures = dict.fromkeys(np.flatnonzero(failed_b).tolist(), "elsewhere")

    def _start_step(self, row: int, tokens_t: np.ndarray, replies: queue.SimpleQueue) -> None:
        self.turns_b[row] += 1
        made = self._environments.setdefault(row, [])
        arguments = row, made, self._read(tokens_t), replies
        # Not of a pool, whose threads an environment could use up; and not waited for at the end.
        threading.Thread(target=self._step, args=arguments, daemon=True).start()

    def _step(
        self, row: int, made: list[Environment], text: str, replies: queue.SimpleQueue
    ) -> None:
        try:
            if not made:
                made.append(self._make(self._examples[row]))
            reply: Any = made[0].step(text)
        except BaseException as error:  # whatever the user's code raises
            reply = error
        replies.put((row, reply))

    def _taken(self, row: int, reply: Any) -> np.ndarray | None:
        if isinstance(reply, BaseException):
            self._fail(row, describe(reply))
            return None
        try:
            reward = float(reply.reward)
            if not math.isfinite(reward):
                raise ValueError(f"its reward is {reward}")
            self.reward_b[row] += reward
            if not reply.messages or self.turns_b[row] >= self._max_turns:
                return None
            return self._write(reply.messages)
        except Exception as error:
            self._fail(row, f"it replied with {type(reply).__name__}: {describe(error)}")
            return None

    def _fail_late(self, row: int) -> None:
        self._fail(row, f"no reply within {self._timeout:g} s")

    def _fail(self, row: int, reason: str) -> None:
        self._failures[row] = f"example {self._examples[row].id}: {reason}"
        if len(self._failures) > self._max_failures * len(self._examples):
            raise RunStopped(
                f"{len(self._failures)} of {len(self._examples)} dialogues failed in their "
                f"environment, first {next(iter(self._failures.values()))}: mend it, or raise "
                f"environment.max_failures={self._max_failures:g}"
            )
