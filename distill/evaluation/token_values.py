"""What a model and its teachers think of responses, and of their tokens, by one pass of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base.sharding import constrain_whole, flatten_tokens, num_shards
from distill.batches.rows import Rows, teacher_hidden
from distill.data.prompts import Prompts
from distill.evaluation.rows import of_responses, rows_of
from distill.kernels.linear_divergence import SharedIds, per_token_divergences
from distill.losses.divergences import get_divergence
from distill.losses.objective import Objective
from distill.models.model import Model
from distill.sampling.request import Rollout

# The first held-out prompts, with so many tokens of responses at most: some two megabytes.
MOST_RESPONSES, MOST_TOKENS = 32, 16384
TOP = 10  # likeliest tokens of either model that are compared
_MOST_LOGITS = 2**26  # of one model in one group of devices at once
_CHOICES = ("top_ids", "top_log_p", "top_log_q")

Values = dict[str, np.ndarray]  # (r,) or (r, k) by name
Compared = tuple[np.ndarray, int]  # sums of forward and reverse KL, and of how many tokens


class TokenReader:
    """Reads responses with a model and its teachers, which each pass them once.

    Args:
      objective: its divergence is what a token adds to the loss.
      vocab_size: ids in use.
      batch_size: responses looked at at once.
      put: places a host array with batch rows first on the mesh.
      shared: by name, what teachers with another tokenizer have of the model's ids.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        vocab_size: int,
        batch_size: int,
        put: Callable[[np.ndarray], jax.Array],
        shared: Mapping[str, SharedIds] | None = None,
    ):
        self._batch_size, self._put, self._shared = batch_size, put, shared or {}
        self._read = jax.jit(
            functools.partial(_read, objective=objective, vocab_size=vocab_size),
            static_argnums=(0, 2, 6),
        )

    def __call__(
        self,
        model: Model,
        teachers: Mapping[str, Model | None],
        prompts: Prompts,
        rollout: Rollout,
        *,
        reads_tokens: bool,
    ) -> tuple[dict[str, Compared], dict[int, Values]]:
        """What each teacher says of the responses; and by their numbers, values of their tokens.

        Args:
          teachers: in the order of `prompts.by_teacher`; None where one is not on the mesh.
          reads_tokens: whether those values are asked for, see `_read`. Where several teachers are
            asked about a prompt, they are the first one's, but of none with another tokenizer. The
            teacher's choices are kept of the responses that are shown.
        """
        params, width = model.fetch(), rollout.tokens_br.shape[1]
        compared: dict[str, Compared] = {}
        values: dict[int, Values] = {}
        for (name, teacher), part in zip(teachers.items(), prompts.by_teacher, strict=True):
            if teacher is None or not len(part):
                continue
            teacher_params = params if teacher is model else teacher.fetch()
            models = model.graph, params, teacher.graph, teacher_params
            reads = reads_tokens and part.recut is None
            sums, tokens = np.zeros(2, np.float32), 0
            for numbers, rows, made in self._batches(
                models, prompts, part, rollout, self._shared.get(name), width if reads else None
            ):
                sums += made.pop("kl_sums")
                tokens += int((rows.mask_bt & (rows.columns.get("span", 0) == 0)).sum())
                for i, of_response in _by_response(made, numbers, rollout):
                    values.setdefault(i, of_response)
            compared[name] = sums, tokens
        if reads_tokens and not values:
            alone = model.graph, params, None, None
            for numbers, _, made in self._batches(alone, prompts, prompts, rollout, None, width):
                values |= _by_response(made, numbers, rollout)
        return compared, values

    def _batches(
        self,
        models: tuple,
        prompts: Prompts,
        part: Prompts,
        rollout: Rollout,
        shared: SharedIds | None,
        width: int | None,
    ) -> Iterator[tuple[list[int], Rows, dict[str, np.ndarray]]]:
        """Numbers of the responses, their rows on the host, and what was read of them."""
        own_b, shown = np.searchsorted(prompts.rows, part.rows), num_shown(rollout.lengths_b)
        own = jax.tree.map(lambda x: x[own_b], rollout)
        for number, rows in enumerate(rows_of(part, own, self._batch_size)):
            numbers = own_b[number * self._batch_size :][: self._batch_size].tolist()
            made = self._read(*models, jax.tree.map(self._put, rows), shared, width)
            if numbers[0] >= shown:
                made = {name: x for name, x in made.items() if name not in _CHOICES}
            yield numbers, rows, jax.device_get(made)


def _by_response(
    made: dict[str, np.ndarray], numbers: list[int], rollout: Rollout
) -> Iterator[tuple[int, Values]]:
    """Of the tokens of each response alone."""
    for row, i in enumerate(numbers if made else ()):
        yield i, {name: x[row, : rollout.lengths_b[i]] for name, x in made.items()}


def num_shown(lengths_b: np.ndarray) -> int:
    """How many of the first responses are shown: as many as fit, and one at least."""
    fitting = np.cumsum(lengths_b[:MOST_RESPONSES]) <= MOST_TOKENS
    return max(1, int(fitting.sum()))


def _read(
    graph,
    params,
    teacher_graph,
    teacher_params,
    rows: Rows,
    shared: SharedIds | None,
    width: int | None,
    *,
    objective: Objective,
    vocab_size: int,
) -> dict[str, jax.Array]:
    """What one pass of both models says of responses, or of a model alone.

    - kl_sums: forward and reverse KL summed over the response tokens, (2,);
    - with `width`, numbers of the responses' tokens (b, r), anything behind a response's end:
      log_q, the student's log-probability of the token; and with a teacher log_p, the objective's
      divergence, and what `_compare` says.
    """
    model, made = nnx.merge(graph, params), {}
    hidden_s, head_s, hidden_t, head_t = model(rows.tokens_bt), model.head(), None, None
    if teacher_graph is not None:
        teacher = nnx.merge(teacher_graph, teacher_params)
        hidden_t, head_t = teacher_hidden(teacher, rows), teacher.head()
        compared_bt = rows.mask_bt & (rows.columns["span"] == 0 if shared is not None else True)
        kls_nt = per_token_divergences(
            flatten_tokens(hidden_s),
            head_s,
            flatten_tokens(hidden_t),
            head_t,
            divergences=(get_divergence("forward"), get_divergence("reverse")),
            temperature=1.0,
            vocab_size=vocab_size,
            weights=flatten_tokens(compared_bt.astype(jnp.float32)),
            shared=shared,
        )
        made["kl_sums"] = kls_nt.sum(axis=1)
    if width is None:
        return constrain_whole(made)
    # Prompts need no head.
    weights_bt = rows.mask_bt.astype(jnp.float32)
    known = [of_responses(rows, x_bt, width) for x_bt in (rows.targets_bt, weights_bt)]
    hidden_s = of_responses(rows, hidden_s, width)
    if hidden_t is None:
        made["log_q"] = objective.log_probs(hidden_s, head_s, *known, vocab_size=vocab_size)
        return constrain_whole(made)
    hidden_t = of_responses(rows, hidden_t, width)
    _, values = objective.alone(hidden_s, head_s, hidden_t, head_t, *known, vocab_size=vocab_size)
    made |= dict(log_q=values.log_prob_s, log_p=values.log_prob_t, divergence=values.divergence)
    made |= _compare((hidden_s, hidden_t), (head_s, head_t), known[0], vocab_size)
    return constrain_whole(made)


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
