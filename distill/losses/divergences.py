"""Divergences between teacher p and student q, written for one vocabulary entry at a time.

A pointwise divergence is a function f(log_p, log_q) of float32 log-probabilities, elementwise, with
D = sum over the vocabulary of f. Writing f is all a new divergence needs:

    @register_divergence("total_variation")
    def total_variation(log_p, log_q):
        return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))

Its gradient comes from r = df/dlog_q, and it runs in the fused kernels as it is (DivergenceTerm in
kernels/linear_divergence/token_losses.py; `kl_weights` below is explained there). A *term* also
knows the target, f(log_p, log_q, is_target), and is added to a divergence. A loss that is not a sum
of such terms takes whole rows and is registered with `register_loss`. All share one namespace.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill.base.errors import UserError
from distill.base.registry import Registry, name_of
from distill.kernels.linear_divergence import DivergenceTerm, Term, cross_entropy
from distill.kernels.linear_divergence.token_losses import TokenWeight
from distill.losses.weights import advantage, per_token_problem

PointwiseDivergence = Callable[[jax.Array, jax.Array], jax.Array]
# (log_p_cv, log_q_cv, targets_c) -> loss_c; the loss of token c depends on row c alone.
DistillationLossFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Registered:
    function: Callable
    kind: str  # divergence, term or row loss
    parameter: str | None = None  # which argument of get_divergence the function takes third
    weight: TokenWeight | None = None  # of a term


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A divergence with its parameter: comparable, unlike functools.partial, as jit wants it."""

    function: Callable
    parameter: float

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return self.function(log_p, log_q, self.parameter)

    @property
    def kl_weights(self) -> tuple[float, float] | None:
        weights_of = getattr(self.function, "kl_weights_of", None)
        return None if weights_of is None else weights_of(self.parameter)


_LOSSES = Registry(
    "distillation.kl_type",
    "distill.losses.divergences.register_divergence, register_term or register_loss",
)


_TAKES = {
    "divergence": ("log_p", "log_q"),
    "term": ("log_p", "log_q", "is_target"),
    "row loss": ("log_p_cv", "log_q_cv", "targets_c"),
}


def _register(name: str, kind: str, **more):
    takes = _TAKES[kind] + (("parameter",) if "parameter" in more else ())
    return _LOSSES.register(name, lambda function: _Registered(function, kind, **more), takes)


def _is(*kinds: str) -> Callable[[_Registered], bool]:
    return lambda registered: registered.kind in kinds


# Estimators of a KL from the sampled token, or from few, that estimate another gradient or none.
_KL3 = "differentiated, its expected gradient is the forward KL's: kl_type=forward is exact"
_NO_ESTIMATORS = {
    "k1": "differentiated, log q - log p of the sampled token has an expected gradient of zero: "
    "distillation.objective.teacher_advantage=1 makes it an advantage, kl_type=reverse is exact",
    "k2": "its gradient is that of distillation.objective.teacher_advantage=1: use that, or "
    "kl_type=reverse, which is exact",
    "k3": _KL3,
    "low_var_kl": _KL3,
    "top_k": "a KL of few tokens, cut off or renormalised, is none: kl_type is exact, and with "
    "teacher.backend=vllm all other tokens are one outcome",
    "top_k_advantage": "a KL of the place does not depend on the token that was sampled there, so "
    "that its expected policy gradient is zero: use distillation.objective.teacher_advantage=1",
}


def _find(name: str, key: str, *kinds: str) -> _Registered:
    if name in _NO_ESTIMATORS and not _LOSSES.knows(name):
        raise UserError(f"{key}={name} is refused: {_NO_ESTIMATORS[name]}")
    return _LOSSES.get(name, _is(*kinds), key=key)


def register_divergence(name: str):
    """Decorator: makes a pointwise f(log_p, log_q) available as `kl_type=name`.

    The function is elementwise in jax.numpy, and finite at the log-probabilities it will meet
    (very negative ones included). UserError when the name is taken.
    """
    return _register(name, "divergence")


def register_term(name: str, *, weight: TokenWeight | None = None):
    """Decorator: makes a pointwise f(log_p, log_q, is_target) available in `objective.terms`.

    `is_target` says whether the entry of the vocabulary is the response's token. `weight` is what
    the term is multiplied by, like those of losses/weights.py but this term's own. UserError when
    the name is taken.
    """
    return _register(name, "term", weight=weight)


def register_loss(name: str):
    """Decorator: makes a `DistillationLossFn` over vocabulary rows available as `kl_type=name`.

    Log-probabilities are float32 (tokens, vocabulary) at the loss temperature, targets_c the
    response's ids; the loss of a token, float32, is of its own row alone. UserError when the name
    is taken.
    """
    return _register(name, "row loss")


def is_pointwise(name: str, key: str = "distillation.kl_type") -> bool:
    """Whether a name is a divergence rather than a loss of rows; UserError when it is neither."""
    return _find(name, key, "divergence", "row loss").kind == "divergence"


def get_loss(name: str) -> DistillationLossFn:
    """The function registered with `register_loss`; UserError for none, or one that cannot run."""
    function = _LOSSES.get(name, _is("row loss")).function
    rows, targets = (jax.ShapeDtypeStruct(*x) for x in (((3, 5), jnp.float32), ((3,), jnp.int32)))
    if problem := per_token_problem(function, rows, rows, targets):
        raise UserError(
            f"distillation.kl_type={name}: {name_of(function)} {problem}; it takes "
            "log-probabilities (tokens, vocabulary) of teacher and student and the tokens' ids, "
            "and must return a loss per token, computed with jax.numpy"
        )
    return function


def get_divergence(
    name: str,
    *,
    mixed_kl_weight: float = 0.5,
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
) -> PointwiseDivergence:
    """The divergence of that name as a hashable, comparable function of (log_p, log_q).

    UserError for an unknown name, or a parameter outside [0, 1]. Their meaning stands below.
    """
    parameters = dict(mixed_kl_weight=mixed_kl_weight, jsd_beta=jsd_beta, skew_alpha=skew_alpha)
    for key, value in parameters.items():
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{key}={value} is not between 0 and 1")
    registered = _LOSSES.get(name, _is("divergence"))
    if registered.parameter is None:
        return registered.function
    return _Bound(registered.function, float(parameters[registered.parameter]))


def get_term(text: str, **parameters: float) -> Term:
    """The term or divergence that a text NAME or NAME:COEFFICIENT stands for, or UserError."""
    name, _, number = text.partition(":")
    key = "distillation.objective.terms"
    registered = _find(name, key, "divergence", "term")
    try:
        coefficient = float(number or 1.0)
    except ValueError:
        coefficient = math.nan
    if not math.isfinite(coefficient):
        raise UserError(f"{key}={text}: {number!r} is not a finite number")
    if registered.kind == "term":
        return Term(registered.function, coefficient, registered.weight)
    return Term(DivergenceTerm(get_divergence(name, **parameters)), coefficient)


@dataclasses.dataclass(frozen=True)
class Clipped:
    """min(f, most) of every vocabulary entry: its part beyond has no gradient.

    The pointwise clip of OPSD (arXiv:2601.18734), by which few entries of a few tokens, often of
    style, do not dominate.
    """

    divergence: PointwiseDivergence
    most: float

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return jnp.minimum(self.divergence(log_p, log_q), self.most)


@dataclasses.dataclass(frozen=True)
class Proximal:
    """The divergence from share p + (1 - share) q, through whose q no gradient goes.

    The proximal teacher of TOP-D (Xie et al., "Trust Region Policy Distillation",
    arXiv:2607.04751): no log-ratio of q to it is above -log(1 - share).
    """

    divergence: PointwiseDivergence
    share: float

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return self.divergence(_log_mixture(self.share, log_p, _held(log_q)), log_q)


@jax.custom_jvp
def _held(log_q: jax.Array) -> jax.Array:
    """The same without a gradient; not all kernels know `stop_gradient`."""
    return log_q


@_held.defjvp
def _held_jvp(primals, tangents):
    del tangents
    return primals[0], jnp.zeros_like(primals[0])


def _expectation_term(log_weight: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """exp(log_weight) * log_ratio, which tends to 0, not to 0 * inf, as the weight underflows."""
    weight = jnp.exp(log_weight)
    return weight * jnp.where(weight > 0, log_ratio, 0.0)


def _log_mixture(p_weight: float, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """log(p_weight p + (1 - p_weight) q).

    Of the sum itself: `logaddexp` takes longer and is about as accurate. Where the sum underflows,
    so do p and q, whose terms are then 0 (or `p_weight` is below 1e-30).
    """
    if p_weight == 0.0:
        return log_q
    if p_weight == 1.0:
        return log_p
    mixture = p_weight * jnp.exp(log_p) + (1.0 - p_weight) * jnp.exp(log_q)
    return jnp.log(jnp.maximum(mixture, jnp.finfo(mixture.dtype).tiny))


@register_divergence("forward")
def forward(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p||q): the student covers every mode of the teacher."""
    return _expectation_term(log_p, log_p - log_q)


forward.kl_weights = 1.0, 0.0


@register_divergence("reverse")
def reverse(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(q||p): the student avoids what the teacher would not say (MiniLLM, arXiv:2306.08543)."""
    return _expectation_term(log_q, log_q - log_p)


reverse.kl_weights = 0.0, 1.0


@_register("mixed", "divergence", parameter="mixed_kl_weight")
def mixed(log_p: jax.Array, log_q: jax.Array, forward_weight: float) -> jax.Array:
    """forward_weight KL(p||q) + (1 - forward_weight) KL(q||p)."""
    return forward_weight * forward(log_p, log_q) + (1.0 - forward_weight) * reverse(log_p, log_q)


mixed.kl_weights_of = lambda forward_weight: (forward_weight, 1.0 - forward_weight)


@_register("jsd", "divergence", parameter="jsd_beta")
def jsd(log_p: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
    """beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q (GKD, arXiv:2306.13649).

    The formula is 0 at both ends; beta=0 and beta=1 are defined as forward and reverse KL, the
    limits of the divergence over beta and over 1 - beta: the scale jumps there.
    """
    if beta == 0.0:
        return forward(log_p, log_q)
    if beta == 1.0:
        return reverse(log_p, log_q)
    return _inner_jsd(log_p, log_q, beta)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _inner_jsd(log_p: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
    teacher_term, student_term = _jsd_terms(log_p, log_q, beta)
    return teacher_term + student_term


@_inner_jsd.defjvp
def _inner_jsd_and_slope(beta, primals, tangents):
    """The derivative by a distribution's logarithm is that distribution's term.

    The rest cancels: with w = (1 - beta) q / m and so beta p = (1 - w) m, df/dlog_q is
    (1 - beta) q (log q - log m) - beta p w + (1 - beta) q (1 - w).
    """
    teacher_term, student_term = _jsd_terms(*primals, beta)
    p_tangent, q_tangent = tangents
    return teacher_term + student_term, teacher_term * p_tangent + student_term * q_tangent


def _jsd_terms(log_p: jax.Array, log_q: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    log_m = _log_mixture(beta, log_p, log_q)
    teacher_term = _expectation_term(log_p, log_p - log_m)
    student_term = _expectation_term(log_q, log_q - log_m)
    return beta * teacher_term, (1.0 - beta) * student_term


@_register("skew_forward", "divergence", parameter="skew_alpha")
def skew_forward(log_p: jax.Array, log_q: jax.Array, alpha: float) -> jax.Array:
    """KL(p || alpha p + (1 - alpha) q): at most -log(alpha) (DistiLLM, arXiv:2402.03898)."""
    return _expectation_term(log_p, log_p - _log_mixture(alpha, log_p, log_q))


@_register("skew_reverse", "divergence", parameter="skew_alpha")
def skew_reverse(log_p: jax.Array, log_q: jax.Array, alpha: float) -> jax.Array:
    """KL(q || (1 - alpha) p + alpha q): at most -log(alpha) (DistiLLM, arXiv:2402.03898)."""
    return _expectation_term(log_q, log_q - _log_mixture(1.0 - alpha, log_p, log_q))


# Of sampled tokens: the gradient of the expected advantage (of a reward, or of a teacher's
# log-probability), by the score-function estimate.
register_term("policy_gradient", weight=advantage)(cross_entropy)
register_term("cross_entropy")(cross_entropy)
