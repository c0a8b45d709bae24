"""The estimators, each as a loss of the project, and their expected gradients, exactly.

A *sampled* estimator reads the student's and the teacher's probability of one sampled token. Its
loss has one term, which is not 0 for that token y alone. So its gradient by the logits is
r_y (e_y - q), r_y being the term's derivative by log q(y): expectation and variance over y are sums
over the vocabulary. A *dense* one reads the teacher's distribution in each place, or a part of it,
and does not depend on y.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from benchmarks.objectives import objective_of
from distill.kernels.linear_divergence import RowLoss, Term, TermSum, TokenStatistics, TopK
from distill.kernels.linear_divergence import cross_entropy as CROSS_ENTROPY
from distill.kernels.linear_divergence.token_losses import term_weights, terms_and_slopes
from distill.losses.advantages import Advantage

FORWARD, REVERSE = "forward", "reverse"
KS, FEW_KS = (1, 2, 4, 8), (1, 8, 64)  # the second for large vocabularies
SPANS = (2, 4)
LARGE = 1000
TOP_K_ADVANTAGE = 4

# log_p_tv of the teacher -> what is known of it.
Known = Callable[[jax.Array], TopK]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A way to get at the gradient of a KL.

    Attributes:
      claims: the KL whose gradient it is used for.
      loss: of the project's kind.
      estimates: in words, what its expectation is.
      k: tokens that it knows of the teacher; 0: all, or the sampled one.
      known: what stands for the teacher; None: its logits.
      span: tokens whose log-ratios are added up in the column `advantage`; 0: it has none.
    """

    name: str
    claims: str
    loss: TermSum | RowLoss
    estimates: str
    k: int = 0
    known: Known | None = None
    span: int = 0

    @property
    def is_sampled(self) -> bool:
        return isinstance(self.loss, TermSum) and self.loss.terms[0].function in SAMPLED


def k1(log_p, log_q, is_target):
    """log q - log p of the sampled token (Schulman, "Approximating KL Divergence", 2020)."""
    return jnp.where(is_target, log_q - log_p, 0.0)


def k2(log_p, log_q, is_target):
    """Half of its square."""
    return jnp.where(is_target, 0.5 * (log_q - log_p) ** 2, 0.0)


def k3(log_p, log_q, is_target):
    """p / q - 1 - log(p / q), never negative."""
    return jnp.where(is_target, jnp.exp(log_p - log_q) - 1 - (log_p - log_q), 0.0)


SAMPLED = (k1, k2, k3, CROSS_ENTROPY)


def baseline_of_state(statistics: TokenStatistics, columns) -> jax.Array:
    """log p - log q less its expectation, -KL(q||p), which is known where all logits are."""
    assert statistics.reverse_kl is not None
    return statistics.log_prob_t - statistics.log_prob_s + statistics.reverse_kl


def baseline_of_batch(statistics: TokenStatistics, columns) -> jax.Array:
    """log p - log q less its mean over the batch."""
    return statistics.log_prob_t - statistics.log_prob_s - columns["baseline"]


def top_k_advantage(statistics: TokenStatistics, columns) -> jax.Array:
    """Minus a KL of the place over the likeliest tokens: the same, whichever is sampled."""
    return -columns["top_k_kl"]


def _weighted(weight) -> TermSum:
    return TermSum((Term(CROSS_ENTROPY, weight=weight),))


def _of_objective(kl_type: str, **options) -> TermSum | RowLoss:
    return objective_of(kl_type, **options).loss


@dataclasses.dataclass(frozen=True)
class TopKLoss:
    """A KL over the teacher's k likeliest tokens, as they are or renormalised."""

    claims: str
    k: int
    renormalised: bool

    def __call__(self, log_p_cv, log_q_cv, targets_c):
        _, ids_ck = jax.lax.top_k(log_p_cv, self.k)
        log_p_ck, log_q_ck = (
            jnp.take_along_axis(each, ids_ck, axis=1) for each in (log_p_cv, log_q_cv)
        )
        if self.renormalised:
            log_p_ck, log_q_ck = map(jax.nn.log_softmax, (log_p_ck, log_q_ck))
        if self.claims == FORWARD:
            log_p_ck, log_q_ck = log_q_ck, log_p_ck
        return jnp.sum(jnp.exp(log_q_ck) * (log_q_ck - log_p_ck), axis=1)


def likeliest(k: int) -> Known:
    """The teacher as a server tells of it."""
    return lambda log_p_tv: TopK(*jax.lax.top_k(log_p_tv, k)[::-1])


def exact(claims: str) -> Estimator:
    return Estimator(f"exact {claims} KL", claims, _of_objective(claims), f"the {claims} KL")


def top_k(kind: str, claims: str, k: int) -> Estimator:
    """kind: plain, renormalised or bucket."""
    name = f"top {k}, {kind}"
    if kind == "bucket":
        loss, says = _of_objective(claims), "a lower bound of it, which is a divergence"
        return Estimator(name, claims, loss, says, k, likeliest(k))
    loss = RowLoss(TopKLoss(claims, k, kind == "renormalised"))
    return Estimator(name, claims, loss, "no divergence", k)


def all_estimators(vocab_size: int) -> list[Estimator]:
    """In the order of the tables."""
    advantage = _of_objective(REVERSE, divergence=0.0, teacher_advantage=1.0)
    proximal = Advantage(teacher=1.0, proximal_share=0.5)
    of_rewards = _of_objective(REVERSE, divergence=0.0, reward_advantage=1.0)
    mixed = "KL(q, (p + q) / 2), q held"
    at = f"advantage: top {TOP_K_ADVANTAGE} KL of the place"
    return [
        exact(REVERSE),
        Estimator("k1 as a loss", REVERSE, TermSum.of(k1), "nothing: its mean is 0"),
        Estimator("k2 as a loss", REVERSE, TermSum.of(k2), "the reverse KL"),
        Estimator("k3 as a loss", REVERSE, TermSum.of(k3), "the forward KL"),
        Estimator("advantage log p - log q", REVERSE, advantage, "the reverse KL"),
        Estimator(
            "the same less batch mean", REVERSE, _weighted(baseline_of_batch), "the reverse KL"
        ),
        Estimator(
            "the same less state mean", REVERSE, _weighted(baseline_of_state), "the reverse KL"
        ),
        Estimator("advantage, proximal 0.5", REVERSE, _weighted(proximal), mixed),
        Estimator(at, REVERSE, _weighted(top_k_advantage), "nothing: its mean is 0"),
        *(
            Estimator(f"advantage of spans of {n}", REVERSE, of_rewards, "that of the text", span=n)
            for n in SPANS
        ),
        exact(FORWARD),
        *(
            top_k(kind, claims, k)
            for claims in (REVERSE, FORWARD)
            for kind in ("plain", "renormalised", "bucket")
            for k in (KS if vocab_size < LARGE else FEW_KS)
        ),
    ]


def slopes(estimator: Estimator, log_p_tv, log_q_tv, columns: Mapping[str, jax.Array]) -> jax.Array:
    """r_tv: derivative of a sampled estimator's loss by log q, were the token v sampled."""
    kl_t = jnp.sum(jnp.exp(log_q_tv) * (log_q_tv - log_p_tv), axis=1, keepdims=True)
    flat = [x.reshape(-1) for x in (log_q_tv, log_p_tv)]
    statistics = TokenStatistics(
        *flat, reverse_kl=jnp.broadcast_to(kl_t, log_q_tv.shape).reshape(-1)
    )
    shape = log_q_tv.shape
    columns = {n: jnp.broadcast_to(x[:, None], shape).reshape(-1) for n, x in columns.items()}
    assert isinstance(estimator.loss, TermSum)
    (weights,) = term_weights(estimator.loss, jnp.ones_like(flat[0]), statistics, columns)
    _, (slope_tv,) = terms_and_slopes(estimator.loss, log_p_tv, log_q_tv, jnp.ones(shape, bool))
    return weights.reshape(shape) * slope_tv


def expectation(slope_tv, log_q_tv, head_dv) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the sampled token of the gradient by hidden states: (t, d), (t,)."""
    q_tv = jnp.exp(log_q_tv)
    mean_tv = q_tv * slope_tv - q_tv * jnp.sum(q_tv * slope_tv, axis=1, keepdims=True)
    mean_td, middle_td = mean_tv @ head_dv.T, q_tv @ head_dv.T
    # ||w_v - m||^2, of every column of the head.
    distance_tv = jnp.sum(head_dv**2, axis=0) - 2 * middle_td @ head_dv
    distance_tv += jnp.sum(middle_td**2, axis=1, keepdims=True)
    squares_t = jnp.sum(q_tv * slope_tv**2 * jnp.maximum(distance_tv, 0.0), axis=1)
    return mean_td, jnp.maximum(squares_t - jnp.sum(mean_td**2, axis=1), 0.0)
