"""Advantages: what makes a sampled token likelier, or less likely, by policy gradient.

The term is -A log q(y), A without gradient. For a response that the student has sampled, its
expected gradient is that of minus the expected reward (Williams, 1992) where A is the response's
reward less anything that does not depend on the response. A batch's sum is divided by one number,
never by a response's own length, which would make long wrong responses cheap (Dr. GRPO,
arXiv:2503.20783; DAPO, arXiv:2503.14476).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence import TokenStatistics
from distill.losses.weights import TruncatedImportance


@dataclasses.dataclass(frozen=True)
class Advantage:
    """What a sampled token's -log q is multiplied by; 0 for tokens that were not sampled.

    reward * A + teacher * (log p(y) - log q(y)), A being the column `advantage`. The second is the
    reverse KL's: its expectation over the sampled token has the gradient of KL(q||p) at that place
    (Thinking Machines Lab, "On-Policy Distillation", 2025). It needs the teacher's log-probability
    of the response's tokens only. With `proximal_share` a below 1 the teacher is a p + (1 - a) q,
    as in TOP-D (arXiv:2607.04751): log(a p(y) / q(y) + 1 - a) is never below log(1 - a).

    `spans` is for a teacher with another tokenizer (None: it has the student's). `teacher` is then
    of tokens that both cut alike, and every token of a span between them gets the same of the
    span, spans * (log p(span) - log q(span)), which is in the column `span_log_ratio`.

    `ratio_clip` e is PPO's (arXiv:1707.06347), as its gradient: with rho = q(y) / q_sampler(y), a
    token has none where A > 0 and rho > 1 + e, or A < 0 and rho < 1 - e. Elsewhere it is
    rho A grad log q, rho being the weight `TruncatedImportance`: of the whole loss, or with
    `importance_clip` of the policy gradient alone. 0: neither.
    """

    reward: float = 0.0
    teacher: float = 0.0
    ratio_clip: float = 0.0
    importance_clip: float = 0.0
    proximal_share: float = 1.0
    spans: float | None = None

    def __bool__(self) -> bool:
        return bool(self.reward or self.teacher or self.spans)

    def __call__(self, statistics: TokenStatistics, columns) -> jax.Array:
        advantage = jnp.zeros_like(statistics.log_prob_s)
        if self.reward:
            advantage += self.reward * columns["advantage"]
        if self.teacher or self.spans:
            log_ratio = statistics.log_prob_t - statistics.log_prob_s
            weight: float | jax.Array = self.teacher
            if self.spans is not None:
                span = columns["span"]
                log_ratio = jnp.where(span == 0, log_ratio, columns["span_log_ratio"])
                weight = jnp.where(span == 0, weight, jnp.where(span > 0, self.spans, 0.0))
            if self.proximal_share < 1:
                log_share = math.log(self.proximal_share)
                log_ratio = jnp.logaddexp(log_share + log_ratio, math.log1p(-self.proximal_share))
            advantage += weight * log_ratio
        kept = columns["sampled"]
        if self.ratio_clip:
            ratio = jnp.exp(statistics.log_prob_s - columns["log_prob"])
            beyond = jnp.where(advantage > 0, ratio - 1.0, 1.0 - ratio) > self.ratio_clip
            kept &= ~beyond
        if self.importance_clip:
            advantage *= TruncatedImportance(self.importance_clip)(statistics, columns)
        return jnp.where(kept, advantage, 0.0)
