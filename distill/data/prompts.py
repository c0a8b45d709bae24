"""Prompts of a dataset as tokens, with their responses and with what teachers read."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.base.errors import printable
from distill.data.base import Dropped
from distill.data.sequences import Sequences

_WIDTH_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The rows of a dataset that fit, in the dataset's order.

    Attributes:
        rows: dataset index of each kept row, int64.
        prompt_tokens: token ids; equal prompts share one array.
        response_tokens: of the reference responses, EOS included; None when not asked for.
        dropped: rows left out, by reason, bad rows of the source among them.
        noted: kept rows of which something is worth saying.
        keys: for each kept row, the same as for other rows of the same prompt.
        view_tokens: of the prompts that the teacher reads; None: the student's.
        retell: makes other ones of a row and texts about it, where the teacher's template names
            {feedback}; None where that would be too long. `retold_excess`: by how many tokens they
            are longer than the prompt, at most.
        recut: makes of responses, of where they begin and of the tokens that there is room for what
            a teacher with another tokenizer reads of them; None: the same tokens. `recut_excess`:
            by how many tokens that may be longer.
        parts: for each of several teachers, the rows that it is asked about, with its view.
    """

    rows: np.ndarray
    prompt_tokens: list[np.ndarray]
    response_tokens: list[np.ndarray] | None
    dropped: dict[str, Dropped]
    pad_id: int
    noted: dict[str, Dropped] = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] = ()
    view_tokens: list[np.ndarray] | None = None
    retell: Callable[[int, Sequence[np.ndarray]], np.ndarray | None] | None = None
    retold_excess: int = 0
    recut: Callable[[Sequences, np.ndarray, np.ndarray], Sequences] | None = None
    recut_excess: int = 0
    parts: tuple["Prompts", ...] = ()

    @property
    def by_teacher(self) -> tuple["Prompts", ...]:
        """What each teacher is asked about: all rows, where there is only one."""
        return self.parts or (self,)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def prompt_width(self) -> int:
        """Longest kept prompt, rounded up to a multiple of 8."""
        return _width(self.prompt_tokens)

    @functools.cached_property
    def response_width(self) -> int:
        """Longest kept response, rounded up to a multiple of 8; 0 when there are none."""
        return _width(self.response_tokens or [])

    def sequences(self, positions: Sequence[int] | np.ndarray) -> Sequences:
        """These rows, with the responses behind the prompts where there are any."""
        tokens = [self.prompt_tokens[i] for i in positions]
        prompts = Sequences.of_tokens(tokens, row=self.rows[positions])
        if self.response_tokens is None:
            return prompts
        responses = [self.response_tokens[i] for i in positions]
        return prompts.join(Sequences.of_tokens(responses, weight=1))

    def view(self, sequences: Sequences) -> Sequences | None:
        """What the teacher reads: its own prompts before the responses; None: the same tokens.

        `sequences` are of these rows, with anything behind the prompts.
        """
        if self.view_tokens is None:
            return None
        kept = np.searchsorted(self.rows, sequences["row"])
        starts_b = np.array([len(self.prompt_tokens[i]) for i in kept], np.int32)
        responses = sequences.behind(starts_b)
        views = [self.view_tokens[i] for i in kept]
        if self.retell is not None:
            for number, feedback in _feedback(sequences, responses).items():
                retold = self.retell(int(sequences["row"][number]), feedback)
                views[number] = views[number] if retold is None else retold
        prompts = Sequences.of_tokens(views)
        if self.recut is not None:
            most_b = sequences.lengths_b + self.view_excess - prompts.lengths_b
            responses = self.recut(responses, starts_b, most_b)
        return prompts.join(responses)

    def of_view(self, pad_id: int) -> "Prompts":
        """What a teacher with another tokenizer reads, as prompts of its own."""
        none: dict[str, Any] = dict(view_tokens=None, response_tokens=None, recut=None)
        tokens = self.view_tokens or []
        return dataclasses.replace(
            self, prompt_tokens=tokens, pad_id=pad_id, recut_excess=0, **none
        )

    @functools.cached_property
    def view_excess(self) -> int:
        """Tokens by which a view is longer than its sequence at most, a multiple of 8."""
        pairs = zip(self.view_tokens or [], self.prompt_tokens, strict=False)
        longest = max((len(theirs) - len(ours) for theirs, ours in pairs), default=0)
        longest = max(longest, self.retold_excess) + self.recut_excess
        return max(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, 0)

    def digest(self) -> str:
        """The same for the same rows and tokens only."""
        digest = hashlib.sha256(self.rows.tobytes())
        for part in self.parts:
            digest.update(part.digest().encode())
        if self.retell is not None and len(self) and len(self.prompt_tokens[0]):
            probe = self.retell(int(self.rows[0]), [self.prompt_tokens[0][:1]])
            digest.update(b"" if probe is None else probe.tobytes())
        for tokens in [
            *self.prompt_tokens,
            *(self.response_tokens or []),
            *(self.view_tokens or []),
        ]:
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(tokens.tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for the log."""
        lengths = [len(tokens) for tokens in self.prompt_tokens]
        distinct = len({tokens.tobytes() for tokens in self.prompt_tokens})
        # Repeats are what curricula are made of, and what a broken export looks like.
        repeats = f" ({distinct} distinct)" if distinct < len(self) else ""
        noted = f"; {describe_drops(self.noted)}" if self.noted else ""
        return printable(
            f"{len(self)} prompts{repeats} of {min(lengths)} to {max(lengths)} tokens; "
            f"dropped: {describe_drops(self.dropped) or 'none'}{noted}"
        )


def _feedback(sequences: Sequences, responses: Sequences) -> dict[int, list[np.ndarray]]:
    """By sequence, what there is to say of it, as tokens.

    Another response to its prompt that has the highest reward, above 0; what an environment said.
    """
    reward_b, found = sequences["reward"], {}
    said, weights = responses.split("tokens"), responses.split("weight")
    for index in np.unique(sequences["index"]):
        group = np.flatnonzero(sequences["index"] == index)
        best = group[(reward_b[group] == reward_b[group].max()) & (reward_b[group] > 0)]
        for number in group:
            replied = said[number][weights[number] == 0]
            texts = [*(said[other] for other in best[best != number][:1]), replied]
            if texts := [text for text in texts if len(text)]:
                found[int(number)] = texts
    return found


def describe_drops(dropped: Mapping[str, Dropped]) -> str:
    return ", ".join(
        f"{drops.count} {reason} (first {drops.first})" for reason, drops in dropped.items()
    )


def _width(tokens: Sequence[Any]) -> int:
    longest = max((len(row) for row in tokens), default=0)
    return -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
