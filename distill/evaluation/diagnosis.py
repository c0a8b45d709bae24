"""What a model's own responses say of why it learns, or does not, from its teacher.

Made of what `TokenReader` reads. The share of the loss is that of the tokens' divergence, the run's
own. A token *leaves the teacher's path* where likelier tokens hold NUCLEUS of the teacher's
probability. The student has *come back* when none of its next BACK tokens leaves it, or none up to
the response's end; the last token of a response has no next, and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.data.sequences import positions
from distill.data.tokenizer import Vocabulary
from distill.evaluation.token_values import Values
from distill.sampling.request import Rollout

NUCLEUS, BACK = 0.95, 8
MOST_BINS = 48  # of positions in a response
MEANS = ("entropy_p", "entropy_q", "overlap", "mass_p", "mass_q")
CLASSES = ("end", "digits", "style", "other")
_LARGEST = 8  # prompts that are named
_DIGITS = 5
# Words that carry the manner of a response rather than its matter.
_STYLE = frozenset(
    "so thus hence therefore then now next first second finally wait but however okay ok well also "
    "because since let us we i you the a an is are to of and that this it be can will have need "
    "step answer given here sure note okay alternatively actually maybe hmm".split()
)


def diagnose(
    values: Mapping[int, Values],
    rollout: Rollout,
    correct: Sequence[bool | None],
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Numbers for JSON: of all tokens, by position, by class, by prompt, and of departures.

    Args:
      values: by number of the response.
      correct: whether each response of the rollout is right.
    """
    numbers = sorted(values)
    written = [rollout.sampled_br[i, : rollout.lengths_b[i]] for i in numbers]
    lengths_b = np.array([int(is_written_r.sum()) for is_written_r in written])

    def flat(rows: Sequence[np.ndarray]) -> np.ndarray:
        kept = [row[is_written_r] for row, is_written_r in zip(rows, written, strict=True)]
        return np.concatenate(kept)

    names = ("log_p", "divergence", "ahead", *MEANS)
    of_tokens = {n: flat([values[i][n] for i in numbers]).astype(np.float64) for n in names}
    ids_n = flat([rollout.tokens_br[i, : rollout.lengths_b[i]] for i in numbers])
    loss_n = np.nan_to_num(of_tokens.pop("divergence"), posinf=0.0, neginf=0.0)
    of_tokens["surprise"] = -of_tokens.pop("log_p")
    left_n = of_tokens.pop("ahead") >= NUCLEUS
    first_b = _first(left_n, lengths_b)
    return dict(
        tokens=len(ids_n),
        responses=len(numbers),
        means={name: _mean(x_n) for name, x_n in of_tokens.items()},
        positions=_by_position(of_tokens, loss_n, first_b, lengths_b),
        classes=_by_class(loss_n, ids_n, vocabulary),
        prompts=_by_prompt(loss_n, lengths_b, numbers),
        departures=_departures(left_n, first_b, lengths_b, [correct[i] for i in numbers]),
    )


def _by_position(
    of_tokens: Mapping[str, np.ndarray],
    loss_n: np.ndarray,
    first_b: np.ndarray,
    lengths_b: np.ndarray,
) -> dict[str, list]:
    """Columns of equal length, a row for each bin of positions.

    start, tokens, the means of `of_tokens`, the share of the loss, and `left`: the share of all
    responses that have left the teacher's path by the bin's end.
    """
    longest = int(lengths_b.max(initial=1))
    width = -(-longest // MOST_BINS)
    count = -(-longest // width)
    bin_n = positions(lengths_b) // width
    tokens_k = np.bincount(bin_n, minlength=count)
    means = {
        name: rounded(np.bincount(bin_n, x_n, count) / np.maximum(tokens_k, 1))
        for name, x_n in of_tokens.items()
    }
    firsts_k = np.bincount(first_b[first_b >= 0] // width, minlength=count)
    return dict(
        start=(np.arange(count) * width).tolist(),
        tokens=tokens_k.tolist(),
        **means,
        loss=_shares(np.bincount(bin_n, loss_n, count)),
        left=rounded(np.cumsum(firsts_k) / max(1, len(lengths_b))),
    )


def _by_class(
    loss_n: np.ndarray, ids_n: np.ndarray, vocabulary: Vocabulary
) -> dict[str, dict[str, float]]:
    """Share of the tokens and of the loss."""
    known, which_n = np.unique(ids_n, return_inverse=True)
    ends, decode = set(vocabulary.end_ids), vocabulary.tokenizer.decode
    classes = ["end" if i in ends else class_of(str(decode([i]))) for i in known.tolist()]
    class_n = np.array([CLASSES.index(name) for name in classes], int)[which_n]
    tokens = _shares(np.bincount(class_n, minlength=len(CLASSES)))
    loss = _shares(np.bincount(class_n, loss_n, len(CLASSES)))
    return {name: dict(tokens=tokens[i], loss=loss[i]) for i, name in enumerate(CLASSES)}


def class_of(text: str) -> str:
    """What a token's text is: 'digits', 'style' or 'other'; whether it ends, its id says."""
    word = text.strip().lower()
    if any(c.isdigit() for c in word) and not any(c.isalpha() for c in word):
        return "digits"
    return "style" if word.strip(",.:;!?*") in _STYLE else "other"


def _by_prompt(loss_n: np.ndarray, lengths_b: np.ndarray, numbers: Sequence[int]) -> dict[str, Any]:
    """The prompts with most of the loss, and the share of prompts that have half of it."""
    prompt_n = np.repeat(np.arange(len(numbers)), lengths_b)
    shares_b = np.array(_shares(np.bincount(prompt_n, loss_n, len(numbers))))
    order = np.argsort(-shares_b, kind="stable")
    half = int(np.searchsorted(np.cumsum(shares_b[order]), 0.5)) + 1
    largest = [dict(number=numbers[i], loss=float(shares_b[i])) for i in order[:_LARGEST]]
    return dict(half=min(half, len(order)) / max(1, len(order)), largest=largest)


def _departures(
    left_n: np.ndarray, first_b: np.ndarray, lengths_b: np.ndarray, correct: Sequence[bool | None]
) -> dict[str, float | None]:
    """How often the student leaves the teacher's path, and what becomes of it.

    tokens, responses: shares that leave; back: of the tokens that do, the share that comes back;
    right, right_otherwise: shares of the graded responses that left, and of the others.
    """
    back = []
    for left_r in np.split(left_n, np.cumsum(lengths_b)[:-1]):
        back += [not left_r[i + 1 : i + 1 + BACK].any() for i in np.flatnonzero(left_r[:-1])]
    graded = [(first >= 0, c) for first, c in zip(first_b, correct, strict=True) if c is not None]
    return dict(
        tokens=_mean(left_n),
        responses=_mean(first_b >= 0),
        back=_mean(np.array(back)),
        right=_mean(np.array([c for left, c in graded if left])),
        right_otherwise=_mean(np.array([c for left, c in graded if not left])),
    )


def _first(left_n: np.ndarray, lengths_b: np.ndarray) -> np.ndarray:
    """Position of the first token of each response that leaves the path; -1 without any."""
    rows = np.split(left_n, np.cumsum(lengths_b)[:-1])
    return np.array([int(left_r.argmax()) if left_r.any() else -1 for left_r in rows], int)


def _mean(values: np.ndarray) -> float | None:
    mean = float(np.mean(values)) if len(values) else math.nan
    return round(mean, _DIGITS) if math.isfinite(mean) else None


def _shares(sums: np.ndarray) -> list[float]:
    """Of their sum; the divergence may be 0 everywhere."""
    return rounded(sums / (sums.sum() or 1.0))


def rounded(values: np.ndarray) -> list:
    """As JSON, which has no NaN."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [round(x, _DIGITS) if math.isfinite(x) else None for x in values.tolist()]
