"""What student and teacher think of every token of responses, by one pass of both models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base.sharding import constrain_whole, num_shards
from distill.batches.rows import Rows, of_responses, teacher_hidden
from distill.data.prompts import Prompts
from distill.evaluation.evaluator import rows_of
from distill.losses.objective import Objective
from distill.models.model import Model
from distill.sampling.request import Rollout

TOP = 10  # likeliest tokens of either model that are compared
_MOST_LOGITS = 2**26  # of one model in one group of devices at once
_CHOICES = ("top_ids", "top_log_p", "top_log_q")

Values = dict[str, np.ndarray]  # (r,) or (r, k) by name


class TokenReader:
    """Reads responses with both models, a chunk of tokens at a time.

    Args:
      objective: its divergence is what a token adds to the loss.
      vocab_size: ids in use.
      batch_size: responses looked at at once.
      put: places a host array with batch rows first on the mesh.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        vocab_size: int,
        batch_size: int,
        put: Callable[[np.ndarray], jax.Array],
    ):
        self._batch_size, self._put = batch_size, put
        self._token_values = jax.jit(
            functools.partial(_token_values, objective=objective, vocab_size=vocab_size),
            static_argnums=(0, 2, 5),
        )

    def __call__(
        self,
        model: Model,
        teachers: Sequence[Model | None],
        prompts: Prompts,
        rollout: Rollout,
        with_choices: int,
    ) -> dict[int, Values]:
        """By number of the response: values by name, of its tokens alone; see `_token_values`.

        Where several teachers are asked about a prompt, the first of them is read, but none with
        another tokenizer. The teacher's choices are kept of the first `with_choices` responses.
        """
        params, values = model.fetch(), {}
        asked: list[tuple[Model | None, Prompts]] = [
            (teacher, of_teacher)
            for teacher, of_teacher in zip(teachers, prompts.by_teacher, strict=True)
            if teacher is not None and of_teacher.recut is None
        ]
        for teacher, of_teacher in reversed(asked or [(None, prompts)]):
            own_b = np.searchsorted(prompts.rows, of_teacher.rows)
            own = jax.tree.map(lambda x, own_b=own_b: x[own_b], rollout)
            teacher_params = teacher and teacher.fetch()
            models = model.graph, params, teacher and teacher.graph, teacher_params
            for number, rows in enumerate(rows_of(of_teacher, own, self._batch_size)):
                numbers = own_b[number * self._batch_size :][: self._batch_size].tolist()
                rows = jax.tree.map(self._put, rows)
                made = self._token_values(*models, rows, rollout.tokens_br.shape[1])
                if numbers[0] >= with_choices:
                    made = {name: x for name, x in made.items() if name not in _CHOICES}
                made = jax.device_get(made)
                for row, i in enumerate(numbers):
                    length = rollout.lengths_b[i]
                    values[i] = {name: x[row, :length] for name, x in made.items()}
        return values


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
    """Numbers of the responses' tokens (b, r), anything behind a response's end.

    log_q, the student's log-probability of the token; and with a teacher log_p, the objective's
    divergence, and what `_compare` says.
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
    known_of_token = dict(
        log_q=values.log_prob_s, log_p=values.log_prob_t, divergence=values.divergence
    )
    compared = _compare((hidden_s, hidden_t), (head_s, head_t), known[0], vocab_size)
    return constrain_whole(known_of_token | compared)


def _compare(hidden_brd, heads, targets_br, vocab_size: int) -> dict[str, jax.Array]:
    """Both models' distributions at temperature 1, by name, (b, r) and for choices (b, r, k).

    - ahead: the teacher's mass of tokens that it finds likelier than the response's;
    - entropy_p, entropy_q: of teacher and student, nats;
    - overlap: share of the teacher's k likeliest tokens that are among the student's k likeliest;
    - mass_p, mass_q: what either gives to these together;
    - top_ids, top_log_p, top_log_q: the teacher's choices with both log-probabilities.

    Args:
      hidden_brd, heads: of the student and of the teacher.
      targets_br: the response's tokens.
    """
    rows, width, _ = hidden_brd[0].shape
    logits = rows * heads[1].weights_dv.shape[1] // (num_shards("batch") * num_shards("act_vocab"))
    size = min(width, max(1, _MOST_LOGITS // logits))
    count = -(-width // size)

    def cut(x_brx):
        padding = [(0, 0), (0, count * size - width)] + [(0, 0)] * (x_brx.ndim - 2)
        padded_brx = jnp.pad(x_brx, padding)
        return padded_brx.reshape(rows, count, size, *x_brx.shape[2:]).swapaxes(0, 1)

    def compare(chunk):
        *hidden_bcd, targets_bc = chunk
        log_q_bcv, log_p_bcv = (
            _log_probs(head.logits(x_bcd), vocab_size)
            for x_bcd, head in zip(hidden_bcd, heads, strict=True)
        )
        (log_p_bck, ids_bck), (_, ids_q_bck) = (
            jax.lax.top_k(x_bcv, min(TOP, vocab_size)) for x_bcv in (log_p_bcv, log_q_bcv)
        )
        log_q_bck = jnp.take_along_axis(log_q_bcv, ids_bck, axis=-1)
        shared_bck = (ids_bck[..., None] == ids_q_bck[..., None, :]).any(axis=-1)
        own_bc1 = jnp.take_along_axis(log_p_bcv, targets_bc[..., None], axis=-1)
        return {
            "ahead": jnp.sum(jnp.exp(log_p_bcv), axis=-1, where=log_p_bcv > own_bc1),
            "entropy_p": _entropy(log_p_bcv),
            "entropy_q": _entropy(log_q_bcv),
            "overlap": jnp.mean(shared_bck, axis=-1, dtype=jnp.float32),
            "mass_p": jnp.sum(jnp.exp(log_p_bck), axis=-1, where=shared_bck),
            "mass_q": jnp.sum(jnp.exp(log_q_bck), axis=-1, where=shared_bck),
        } | dict(zip(_CHOICES, (ids_bck, log_p_bck, log_q_bck), strict=True))

    chunks = jax.lax.map(compare, tuple(map(cut, (*hidden_brd, targets_br))))
    return {
        name: x.swapaxes(0, 1).reshape(rows, count * size, *x.shape[3:])[:, :width]
        for name, x in chunks.items()
    }


def _entropy(log_probs_bcv) -> jax.Array:
    exists_bcv = jnp.isfinite(log_probs_bcv)
    return -jnp.sum(jnp.exp(log_probs_bcv) * jnp.where(exists_bcv, log_probs_bcv, 0.0), axis=-1)


def _log_probs(logits_bcv, vocab_size: int) -> jax.Array:
    # Not cut: the columns may be split over devices.
    exists_v = jnp.arange(logits_bcv.shape[-1]) < vocab_size
    return jax.nn.log_softmax(jnp.where(exists_v, logits_bcv, -jnp.inf))
