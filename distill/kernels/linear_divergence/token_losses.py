"""The losses: what is computed for a token once the logits of both models are there.

A *term* is a pointwise f(log p, log q, is_target), teacher p and student q, summed over the
vocabulary; sums of terms are the kind that runs fused (sweeps.py). A row loss sees whole rows at
once. Instances are frozen and hashable: static arguments. All arithmetic is float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from distill.base.errors import UserError

# (log_p, log_q, is_target) -> f, elementwise; log_p is None without a teacher. Its attribute
# `sums`, if it has one, is a function of `sweeps.Statistics` and the temperature: (sum_v f,
# sum_v df/dlog_q), which spares it a sweep.
PointwiseTerm = Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenValues:
    """Numbers per token beside the loss, float32, without gradient.

    `terms` are the sums of every term before weighting, or the one value of a row loss;
    `log_prob_s` and `log_prob_t` are the student's and teacher's log-probability of the target at
    temperature 1 over the shared vocabulary, zeros without targets or without a teacher.
    """

    terms: tuple[jax.Array, ...]
    log_prob_s: jax.Array
    log_prob_t: jax.Array

    @property
    def divergence(self) -> jax.Array:
        """The first term."""
        return self.terms[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """What is known of a token before any gradient is made, float32, without gradient.

    Attributes:
      log_prob_s, log_prob_t: as in `TokenValues`.
      forward_kl, reverse_kl: KL(p||q) and KL(q||p) at the loss temperature; None where the teacher
        is known by scores, or there is none.
      teacher_entropy: of p, in nats; None unless a weight asks for it, and where the KLs are None.
    """

    log_prob_s: jax.Array
    log_prob_t: jax.Array
    forward_kl: jax.Array | None = None
    reverse_kl: jax.Array | None = None
    teacher_entropy: jax.Array | None = None


# (TokenStatistics, columns of the tokens by name) -> what to multiply the tokens' loss by. One with
# an attribute `teacher_entropy = True` asks for that; it costs a sum in the first sweep.
TokenWeight = Callable[[TokenStatistics, Mapping[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class DivergenceTerm:
    """sum_v f(log p, log q).

    A divergence that is a KL(p||q) + b KL(q||p) may say so in an attribute `kl_weights = (a, b)`:
    it is spared a sweep.
    """

    divergence: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, log_p, log_q, is_target):
        del is_target
        return self.divergence(log_p, log_q)

    def sums(self, statistics, temperature: float):
        del temperature
        weights = getattr(self.divergence, "kl_weights", None)
        if weights is None:
            return None
        forward_weight, reverse_weight = weights
        forward, reverse = kls(statistics)
        # df/dlog_q is -p for the forward and q (log q - log p + 1) for the reverse KL.
        divergence = forward_weight * forward + reverse_weight * reverse
        return divergence, reverse_weight * (reverse + 1.0) - forward_weight


def kls(statistics) -> tuple[jax.Array, jax.Array]:
    """KL(p||q) and KL(q||p) of each token."""
    log_ratio = jnp.log(statistics.sum_s) - jnp.log(statistics.sum_t)
    forward = statistics.cross_forward / statistics.sum_t + log_ratio
    return forward, statistics.cross_reverse / statistics.sum_s - log_ratio


@dataclasses.dataclass(frozen=True)
class CrossEntropyTerm:
    """-log q of the target; no teacher is needed."""

    def __call__(self, log_p, log_q, is_target):
        del log_p
        return jnp.where(is_target, -log_q, 0.0)

    def sums(self, statistics, temperature: float):
        log_q_c = statistics.target_s / temperature - statistics.max_s - jnp.log(statistics.sum_s)
        return -log_q_c, jnp.full_like(log_q_c, -1.0)


cross_entropy = CrossEntropyTerm()


@dataclasses.dataclass(frozen=True)
class Term:
    """coefficient * weight * sum_v function, per token; `weight` None is 1."""

    function: Callable  # a PointwiseTerm, or the function of a row loss
    coefficient: float = 1.0
    weight: TokenWeight | None = None

    @property
    def sums(self) -> Callable:
        return getattr(self.function, "sums", lambda *_: None)


@dataclasses.dataclass(frozen=True)
class TermSum:
    """A token's sum of terms, times the product of `weights`; p and q are at `temperature`."""

    terms: tuple[Term, ...]
    temperature: float = 1.0
    weights: tuple[TokenWeight, ...] = ()

    @classmethod
    def of(cls, *functions: PointwiseTerm, temperature: float = 1.0) -> TermSum:
        return cls(tuple(map(Term, functions)), temperature)


@dataclasses.dataclass(frozen=True)
class RowLoss:
    """A user's loss_fn(log_p_tv, log_q_tv, targets_t) -> loss_t, differentiated by jax.vjp."""

    loss_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    temperature: float = 1.0
    weights: tuple[TokenWeight, ...] = ()

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term(self.loss_fn),)

    def values(self, logits_s_tv, logits_t_tv, targets_t):
        """Loss of each token, (t,), from float32 logits (t, v) at temperature 1."""
        log_p_tv = jax.nn.log_softmax(logits_t_tv / self.temperature)
        log_q_tv = jax.nn.log_softmax(logits_s_tv / self.temperature)
        losses_t = self.loss_fn(log_p_tv, log_q_tv, targets_t)
        if losses_t.shape != targets_t.shape:
            raise ValueError(
                f"a distillation loss returns one number per token, shape {targets_t.shape}; "
                f"{self.loss_fn} returned {losses_t.shape}"
            )
        return losses_t.astype(jnp.float32)


def terms_and_slopes(loss: TermSum, log_p, log_q, is_target):
    """Of every term, f and df/dlog_q, elementwise: two tuples."""

    def terms(log_q):
        return tuple(term.function(log_p, log_q, is_target) for term in loss.terms)

    return jax.jvp(terms, (log_q,), (jnp.ones_like(log_q),))


def weights_of(loss: TermSum | RowLoss) -> list[TokenWeight]:
    """Those of the whole loss and of its terms."""
    return [*loss.weights, *(term.weight for term in loss.terms if term.weight is not None)]


def term_weights(
    loss: TermSum | RowLoss, weights_c: jax.Array, statistics: TokenStatistics, columns: Mapping
) -> tuple[jax.Array, ...]:
    """The tokens' weights in every term, (c,) each: `weights_c` times what the loss says.

    0 stays 0 whatever it is multiplied by: such a token has no say.
    """

    def times(weights_c, weight: TokenWeight):
        try:
            factor_c = jax.lax.stop_gradient(weight(statistics, columns))
        except KeyError as error:
            raise UserError(
                f"the weight {_name(weight)} of the objective reads a column {error}, which the "
                f"batch does not have: it has {', '.join(sorted(columns)) or 'none'}"
            ) from None
        return jnp.where(weights_c != 0, weights_c * factor_c, 0.0)

    for weight in loss.weights:
        weights_c = times(weights_c, weight)
    scaled = (
        weights_c if term.coefficient == 1.0 else term.coefficient * weights_c
        for term in loss.terms
    )
    return tuple(
        scaled_c if term.weight is None else times(scaled_c, term.weight)
        for term, scaled_c in zip(loss.terms, scaled, strict=True)
    )


def weighted_sum(weights: tuple[jax.Array, ...], terms: tuple[jax.Array, ...]) -> jax.Array:
    """sum_i weights_i terms_i per token; without weight not even an infinite term has a say."""
    products = (
        jnp.where(weights_t != 0, weights_t * term_t, 0.0)
        for weights_t, term_t in zip(weights, terms, strict=True)
    )
    return functools.reduce(jnp.add, products)


def _name(function) -> str:
    return getattr(function, "__name__", repr(function))


# Operations that keep an array's shape and yet mix its entries.
_MIXING = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev", "gather"}
_MIXING |= {"dot_general", "scan", "while", "fft"}


def check_pointwise(function: PointwiseTerm) -> None:
    """ValueError unless it is a function of three arrays that works entry by entry."""
    user = function.divergence if isinstance(function, DivergenceTerm) else function
    arguments = "(log_p, log_q" + (")" if user is not function else ", is_target)")
    if not callable(user) or getattr(user, "__hash__", None) is None:
        kind = "term" if user is function else "divergence"
        raise ValueError(f"{kind}={user!r} is not a hashable function of {arguments}")
    _check_entries_are_separate(function, _name(user))


def reads_teacher(function: PointwiseTerm) -> bool:
    """Whether a term fails without log_p."""
    array, is_target = (jax.ShapeDtypeStruct((3, 5), dtype) for dtype in (jnp.float32, jnp.bool_))
    try:
        jax.eval_shape(functools.partial(function, None), array, is_target)
    except Exception:  # whatever a user's code makes of None
        return True
    return False


@functools.lru_cache(maxsize=256)
def _check_entries_are_separate(function: PointwiseTerm, name: str) -> None:
    array = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    is_target = jax.ShapeDtypeStruct(array.shape, jnp.bool_)
    try:
        program = jax.make_jaxpr(function)(array, array, is_target)
    except Exception as error:  # whatever a user's code raises
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} fails ({type(error).__name__}: {reason}): it must be computed with jax.numpy, "
            "elementwise"
        ) from error
    shapes = [output.shape for output in program.out_avals]
    if shapes != [array.shape]:
        problem = f"of two arrays of shape {array.shape} it made {shapes}"
    elif mixing := _first_mixing(program.jaxpr, array.shape):
        problem = f"it uses {mixing}, which is not elementwise"
    else:
        return
    raise ValueError(
        f"{name} is not pointwise: {problem}; a loss of whole rows is for register_loss"
    )


def _first_mixing(jaxpr, shape: tuple[int, ...]) -> str | None:
    """Name of the first operation that is not elementwise on arrays of this shape."""
    for equation in jaxpr.eqns:
        parameters = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        inner = [getattr(x, "jaxpr", x) for x in parameters]
        inner = [program for program in inner if hasattr(program, "eqns")]
        for program in inner:
            if mixing := _first_mixing(program, shape):
                return mixing
        reads = any(variable.aval.shape == shape for variable in equation.invars)
        keeps = all(variable.aval.shape == shape for variable in equation.outvars)
        name = equation.primitive.name
        if reads and not inner and (not keeps or name in _MIXING):
            return name
    return None
