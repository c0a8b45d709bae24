"""What a teacher makes of a model's answers to held-out prompts, token by token.

Where does a student leave its teacher's path, and how lost is it there? `examine` measures any
answers: the model's own, greedy or sampled, or the teacher's.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.base.sharding import constrain_whole
from distill.batches.rows import Rows, of_responses
from distill.evaluation.evaluator import Evaluator, rows_of
from distill.losses.divergences import get_divergence
from distill.models.model import Model
from distill.sampling.request import Rollout

# Of the likeliest tokens of both models, as many are compared.
TOP_K = 5
# Tokens whose logits exist at once.
_CHUNK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examination:
    """Numbers for every token of the answers (r: response position), 0 behind their ends.

    Attributes:
      forward_kl_br, reverse_kl_br: KL(teacher || model) and KL(model || teacher), nats, float32.
      teacher_log_prob_br: the teacher's log-probability of the token, float32.
      departs_br: whether it is another token than the teacher's likeliest.
      overlap_br: share of the teacher's TOP_K likeliest tokens that are among the model's.
    """

    forward_kl_br: np.ndarray
    reverse_kl_br: np.ndarray
    teacher_log_prob_br: np.ndarray
    departs_br: np.ndarray
    overlap_br: np.ndarray

    def first_departure_b(self) -> np.ndarray:
        """Position of the first token that the teacher would not have chosen; -1 for none."""
        return np.where(self.departs_br.any(axis=1), self.departs_br.argmax(axis=1), -1)


def examine(evaluator: Evaluator, model: Model, teacher: Model, rollout: Rollout) -> Examination:
    """Measures `rollout`, anybody's answers to the evaluator's prompts."""
    params = model.fetch()
    teacher_params = params if teacher is model else teacher.fetch()
    models = model.graph, params, teacher.graph, teacher_params
    sizes = dict(width=rollout.tokens_br.shape[1], vocab_size=evaluator.vocabulary.size)
    parts = [
        jax.device_get(_measure(*models, jax.tree.map(evaluator.put, rows), **sizes))
        for rows in rows_of(evaluator.prompts, rollout, evaluator.settings.batch_size)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(evaluator.prompts)], *parts)


@functools.partial(jax.jit, static_argnames=("graph", "teacher_graph", "width", "vocab_size"))
def _measure(
    graph, params, teacher_graph, teacher_params, rows: Rows, *, width: int, vocab_size: int
) -> Examination:
    def evaluate(graph, params):
        model = nnx.merge(graph, params)
        hidden_brd = of_responses(rows, model(rows.tokens_bt), width)
        return hidden_brd.reshape(-1, hidden_brd.shape[-1]), model.head().cut(vocab_size)

    hidden_sd, head_s = evaluate(graph, params)
    hidden_td, head_t = evaluate(teacher_graph, teacher_params)

    def of_token(arguments):
        hidden_s, hidden_t, token = arguments
        log_q_v = jax.nn.log_softmax(head_s.logits(hidden_s))
        log_p_v = jax.nn.log_softmax(head_t.logits(hidden_t))
        return _measure_token(log_p_v, log_q_v, token)

    arguments = hidden_sd, hidden_td, of_responses(rows, rows.targets_bt, width).reshape(-1)
    measures = jax.lax.map(of_token, arguments, batch_size=_CHUNK)
    valid_br = of_responses(rows, rows.mask_bt, width)

    def arrange(values):
        return constrain_whole(jnp.where(valid_br, values.reshape(valid_br.shape), 0))

    return jax.tree.map(arrange, measures)


def _measure_token(log_p_v, log_q_v, token) -> Examination:
    count = min(TOP_K, len(log_p_v))
    teachers, models = (jax.lax.top_k(log_v, count)[1] for log_v in (log_p_v, log_q_v))
    return Examination(
        forward_kl_br=get_divergence("forward")(log_p_v, log_q_v).sum(),
        reverse_kl_br=get_divergence("reverse")(log_p_v, log_q_v).sum(),
        teacher_log_prob_br=log_p_v[token],
        departs_br=token != jnp.argmax(log_p_v),
        overlap_br=jnp.isin(teachers, models).mean(),
    )
