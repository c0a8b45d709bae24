"""Responses token by token: how far student and teacher are apart, and what the teacher would say.

Written at every evaluation of the student, for the first held-out prompts, as
`rollouts/ROLE.json` in the run's folder; `report.html` shows them.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base import processes
from distill.base.files import write_atomically
from distill.base.sharding import constrain_whole, num_shards
from distill.batches.rows import Rows, of_responses, teacher_hidden
from distill.data.base import DatasetInterface, Example
from distill.data.prompts import Prompts
from distill.evaluation.evaluator import Responses, rows_of
from distill.losses.objective import Objective
from distill.models.model import Model
from distill.sampling.request import Rollout

FOLDER = "rollouts"
# The first held-out prompts, with so many tokens of responses at most: some two megabytes.
MOST_RESPONSES, MOST_TOKENS = 32, 16384
TOP = 5  # choices of the teacher for every token
_MOST_LOGITS = 2**26  # of one model in one group of devices at once, for the teacher's choices
_DIGITS = 5
_UNFINISHED = "\ufffd"  # how tokenizers show a part of a character


class RolloutRecorder:
    """Writes what both models think of every token of a model's responses.

    Args:
      workdir: of the run; only the first of several processes writes.
      dataset: source of the held-out examples.
      prompts: its tokenized prompts.
      tokenizer: shows tokens as text.
      objective: its divergence is what a token is coloured by.
      vocab_size: ids in use.
      batch_size: responses looked at at once.
      put: places a host array with batch rows first on the mesh.
    """

    def __init__(
        self,
        workdir: Path,
        dataset: DatasetInterface,
        prompts: Prompts,
        tokenizer,
        *,
        objective: Objective,
        vocab_size: int,
        batch_size: int,
        put: Callable[[np.ndarray], jax.Array],
    ):
        self._folder = workdir / FOLDER
        self._dataset, self._prompts, self._tokenizer = dataset, prompts, tokenizer
        self._batch_size, self._put = batch_size, put
        self._token_values = jax.jit(
            functools.partial(_token_values, objective=objective, vocab_size=vocab_size),
            static_argnums=(0, 2, 5),
        )

    def __call__(
        self,
        role: str,
        step: int,
        model: Model,
        teachers: Sequence[Model | None],
        responses: Responses,
    ) -> None:
        """Looks at the first of `responses`, which `model` gave to all prompts, and writes them.

        Without a teacher on the mesh, only the model's own probabilities are known. Where several
        are asked about a prompt, the first of them is shown.
        """
        values = self._values(model, teachers, responses.rollout)
        if not processes.is_first():
            return
        shown = [self._response(i, responses, values[i]) for i in sorted(values)]
        listed = {
            token for response in shown for top in response.get("top", ()) for token, *_ in top
        }
        record = dict(
            role=role,
            step=step,
            responses_in_all=len(responses.texts),
            has_teacher=any(teachers),
            responses=shown,
            texts={token: self._text([token]) for token in sorted(listed)},
        )
        self._folder.mkdir(exist_ok=True)
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
        write_atomically(self._folder / f"{role}.json", text + "\n")

    def _values(
        self, model: Model, teachers: Sequence[Model | None], rollout: Rollout
    ) -> dict[int, dict[str, Any]]:
        """Of the shown responses by number: arrays (r,) or (r, k) by name."""
        params, values = model.fetch(), {}
        asked: list[tuple[Model | None, Prompts]] = [
            (teacher, prompts)
            for teacher, prompts in zip(teachers, self._prompts.by_teacher, strict=True)
            if teacher is not None
        ]
        for teacher, prompts in reversed(asked or [(None, self._prompts)]):
            own_b = np.searchsorted(self._prompts.rows, prompts.rows)
            shown_b = own_b[own_b < _num_shown(rollout.lengths_b)]
            own = jax.tree.map(lambda x, own_b=own_b: x[own_b], rollout)
            teacher_params = teacher and teacher.fetch()
            models = model.graph, params, teacher and teacher.graph, teacher_params
            parts = []
            count = math.ceil(len(shown_b) / self._batch_size)
            for rows in itertools.islice(rows_of(prompts, own, self._batch_size), count):
                rows = jax.tree.map(self._put, rows)
                made = self._token_values(*models, rows, rollout.tokens_br.shape[1])
                parts.append(jax.device_get(made))
            for at, number in enumerate(shown_b.tolist()):
                part, row = parts[at // self._batch_size], at % self._batch_size
                values[number] = {name: array[row] for name, array in part.items()}
        return values

    def _response(self, i: int, responses: Responses, values: dict[str, Any]) -> dict[str, Any]:
        example = self._dataset[int(self._prompts.rows[i])]
        tokens = responses.rollout.tokens_br[i, : responses.rollout.lengths_b[i]].tolist()
        of_tokens = {name: _rounded(array[: len(tokens)]) for name, array in values.items()}
        if "top_ids" in of_tokens:
            choices = (of_tokens.pop(name) for name in ("top_ids", "top_log_p", "top_log_q"))
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
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


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


def _num_shown(lengths_b: np.ndarray) -> int:
    """How many of the first responses are written: as many as fit, and one at least."""
    fitting = np.cumsum(lengths_b[:MOST_RESPONSES]) <= MOST_TOKENS
    return max(1, int(fitting.sum()))


def _rounded(values: np.ndarray) -> list:
    """As JSON, which has no NaN."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [round(x, _DIGITS) if math.isfinite(x) else None for x in values.tolist()]


def _token_values(
    graph,
    params,
    teacher_graph,
    teacher_params,
    rows: Rows,
    width: int,
    *,
    objective: Objective,
    vocab_size: int,
) -> dict[str, jax.Array]:
    """Log-probabilities of the responses' tokens, divergences and the teacher's choices.

    log_q, and with a teacher log_p and the objective's divergence, (b, r), anything behind a
    response's end; the teacher's likeliest tokens with both log-probabilities at temperature 1,
    (b, r, k).
    """

    # Prompts need no head.
    model = nnx.merge(graph, params)
    hidden_s, head_s = of_responses(rows, model(rows.tokens_bt), width), model.head()
    weights_bt = rows.mask_bt.astype(jnp.float32)
    known = [of_responses(rows, x_bt, width) for x_bt in (rows.targets_bt, weights_bt)]
    if teacher_graph is None:
        log_q_br = objective.log_probs(hidden_s, head_s, *known, vocab_size=vocab_size)
        return constrain_whole({"log_q": log_q_br})
    model = nnx.merge(teacher_graph, teacher_params)
    hidden_t, head_t = of_responses(rows, teacher_hidden(model, rows), width), model.head()
    _, values = objective.alone(hidden_s, head_s, hidden_t, head_t, *known, vocab_size=vocab_size)
    return constrain_whole(
        {
            "log_q": values.log_prob_s,
            "log_p": values.log_prob_t,
            "divergence": values.divergence,
            **_top_choices((hidden_s, hidden_t), (head_s, head_t), vocab_size),
        }
    )


def _top_choices(hidden_brd, heads, vocab_size: int) -> dict[str, jax.Array]:
    """The teacher's likeliest tokens and both models' log-probabilities of them, (b, r, k).

    Args:
      hidden_brd, heads: of the student and of the teacher.
    """
    rows, width, _ = hidden_brd[0].shape
    logits = rows * heads[1].weights_dv.shape[1] // (num_shards("batch") * num_shards("act_vocab"))
    size = min(width, max(1, _MOST_LOGITS // logits))
    count = -(-width // size)

    def cut(hidden_brd):
        padded_brd = jnp.pad(hidden_brd, ((0, 0), (0, count * size - width), (0, 0)))
        return padded_brd.reshape(rows, count, size, -1).swapaxes(0, 1)

    def choices(chunk):
        log_q_bcv, log_p_bcv = (
            _log_probs(head.logits(hidden_bcd), vocab_size)
            for hidden_bcd, head in zip(chunk, heads, strict=True)
        )
        log_p_bck, ids_bck = jax.lax.top_k(log_p_bcv, min(TOP, vocab_size))
        return ids_bck, log_p_bck, jnp.take_along_axis(log_q_bcv, ids_bck, axis=-1)

    chunks = jax.lax.map(choices, tuple(cut(x) for x in hidden_brd))
    whole = (x.swapaxes(0, 1).reshape(rows, count * size, -1)[:, :width] for x in chunks)
    return dict(zip(("top_ids", "top_log_p", "top_log_q"), whole, strict=True))


def _log_probs(logits_bcv, vocab_size: int) -> jax.Array:
    # Not cut: the columns may be split over devices.
    exists_v = jnp.arange(logits_bcv.shape[-1]) < vocab_size
    return jax.nn.log_softmax(jnp.where(exists_v, logits_bcv, -jnp.inf))
