"""What happens to a chunk's logits between the matrix products: three sweeps over the vocabulary.

    statistics   maximum and sum of exponentials of both models, and what KL needs besides
    term_sums    sums of every term and of its slope, for terms that need this sweep
    gradient     the loss's derivative by the student's logits

This module is their definition in plain XLA, and the implementation on every platform. The Pallas
kernels (pallas_tpu.py, pallas_gpu.py) are the same functions with the same signatures, each reading
every logit once. All arithmetic is float32, softmax and its sums in log space.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence.head import Head, through_cap
from distill.kernels.linear_divergence.token_losses import TermSum, terms_and_slopes
from distill.kernels.platform import platform

# For every term, two arrays of float32 (c,).
PerTerm = Sequence[tuple[jax.Array, jax.Array]]

# Stands in for logits that do not exist: exp(MASKED - x) is 0 for any real logit x, and unlike -inf
# it can be subtracted from itself.
MASKED = -1e30


class Projection(NamedTuple):
    """Hidden states (c, d) and the head (d, V) that makes logits of them, in the compute dtype."""

    hidden_cd: jax.Array
    head_dv: jax.Array
    soft_cap: float | None = None

    def logits(self) -> jax.Array:
        return Head(self.head_dv, self.soft_cap).logits(self.hidden_cd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logits:
    """A chunk's logits at temperature 1, float32, and which of their columns count.

    student_cv, teacher_cv: (c, V_s) and (c, V_t), the latter None without a teacher.
    targets_c: int32, a column, or one out of range for none.
    num_columns: int32 scalar, not necessarily static: the columns that exist, at most
      min(V_s, V_t). What lies in further columns (padding, anything) has no influence.
    soft_cap: of the student, whose logits are below it in size; gradients are by what they were
      before.
    """

    student_cv: jax.Array
    teacher_cv: jax.Array | None
    targets_c: jax.Array
    num_columns: Any
    soft_cap: float | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def models(self) -> list[jax.Array]:
        """The student's, and the teacher's if there is one."""
        return [self.student_cv] if self.teacher_cv is None else [self.student_cv, self.teacher_cv]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Per token, float32 (c,). With z = logits / temperature, s the student's and t the teacher's:

    max_s, max_t: max_v z, at most MASKED where there are no columns.
    sum_s, sum_t: sum_v exp(z - max).
    plain_sum_s, plain_sum_t: sum_v exp(temperature * (z - max)), the same at temperature 1.
    target_s, target_t: the target's logit at temperature 1, 0 where there is no target.
    cross_forward: sum_v exp(z_t - max_t) * ((z_t - max_t) - (z_s - max_s)).
    cross_reverse: sum_v exp(z_s - max_s) * ((z_s - max_s) - (z_t - max_t)).
    entropy_t: sum_v exp(z_t - max_t) * (z_t - max_t), if asked for, else None.

    Without a teacher, all that take its logits are None.
    """

    max_s: jax.Array
    sum_s: jax.Array
    plain_sum_s: jax.Array
    target_s: jax.Array
    max_t: Any = None
    sum_t: Any = None
    plain_sum_t: Any = None
    target_t: Any = None
    cross_forward: Any = None
    cross_reverse: Any = None
    entropy_t: Any = None


def statistics(logits: Logits, *, temperature: float, entropy: bool = False) -> Statistics:
    """The first sweep (two passes here: the maxima must be known before the sums)."""
    scaled_s_cv = _scaled(logits.student_cv, logits.num_columns, temperature)
    max_s, sum_s, plain_sum_s, shifted_s_cv = _softmax_sums(scaled_s_cv, temperature)
    student = max_s, sum_s, plain_sum_s, _at_target(logits.student_cv, logits.targets_c)
    if logits.teacher_cv is None:
        return Statistics(*student)
    scaled_t_cv = _scaled(logits.teacher_cv, logits.num_columns, temperature)
    max_t, sum_t, plain_sum_t, shifted_t_cv = _softmax_sums(scaled_t_cv, temperature)
    entropy_t = jnp.sum(jnp.exp(shifted_t_cv) * shifted_t_cv, axis=-1) if entropy else None
    width = min(shifted_s_cv.shape[1], shifted_t_cv.shape[1])
    shifted_s_cv, shifted_t_cv = shifted_s_cv[:, :width], shifted_t_cv[:, :width]
    return Statistics(
        *student,
        *(max_t, sum_t, plain_sum_t, _at_target(logits.teacher_cv, logits.targets_c)),
        cross_forward=jnp.sum(jnp.exp(shifted_t_cv) * (shifted_t_cv - shifted_s_cv), axis=-1),
        cross_reverse=jnp.sum(jnp.exp(shifted_s_cv) * (shifted_s_cv - shifted_t_cv), axis=-1),
        entropy_t=entropy_t,
    )


def term_sums(loss: TermSum, logits: Logits, statistics: Statistics) -> PerTerm:
    """sum_v f and sum_v df/dlog_q of every term's pointwise f.

    `statistics` are those of all columns, whatever part of them the logits are.
    """
    terms, slopes, _ = _terms_and_slopes(loss, logits, statistics)
    pairs = zip(terms, slopes, strict=True)
    return [(jnp.sum(term_cv, axis=-1), jnp.sum(slope_cv, axis=-1)) for term_cv, slope_cv in pairs]


def gradient(
    loss: TermSum, logits: Logits, statistics: Statistics, factors: PerTerm, *, dtype
) -> jax.Array:
    """Sum over the terms of weight (r - q slope_sum) / temperature, r = df/dlog_q.

    (c, V_s) in `dtype`; `factors` are slope_sum, which is sum_v r over all columns, and weight.
    Columns from num_columns on are 0, and so are tokens without weight, whatever their slopes.
    """
    _, slopes, log_q_cv = _terms_and_slopes(loss, logits, statistics)
    columns = [
        (slope_sum_c[:, None], weights_c[:, None] / loss.temperature)
        for slope_sum_c, weights_c in factors
    ]
    logits_s_cv = logits.student_cv[:, : log_q_cv.shape[1]]
    place = logits_s_cv, logits.soft_cap, _column(logits_s_cv), logits.num_columns
    gradient_cv = weigh_slopes(slopes, log_q_cv, columns, *place)
    padding = logits.student_cv.shape[1] - gradient_cv.shape[1]
    return jnp.pad(gradient_cv.astype(dtype), ((0, 0), (0, padding)))


def weigh_slopes(slopes, log_q, factors, logits, soft_cap, column, num_columns) -> jax.Array:
    """Elementwise, in all implementations: sum over the terms of weight (slope - q slope_sum),
    times the slope of the cap.

    0 in columns from `num_columns` on, and for tokens without weight, whatever their slopes.
    """
    q = jnp.exp(log_q)
    gradient: Any = None
    for slope, (slope_sum, weight) in zip(slopes, factors, strict=True):
        added = through_cap(weight * (slope - q * slope_sum), logits, soft_cap)
        added = jnp.where(column < jnp.where(weight != 0, num_columns, 0), added, 0.0)
        gradient = added if gradient is None else gradient + added
    return gradient


def product(subscripts: str, left, right) -> jax.Array:
    """A matrix product accumulated and returned in float32 whatever the operands' dtype."""
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def gradient_products(gradient_cv, student: Projection, head_gradient_dv):
    """From the gradient by the logits: head_gradient_dv with this chunk's part added, and the
    gradient by the hidden states (c, d); both float32."""
    if platform() == "cpu":
        # In memory first: a product that has to transpose it takes up to twice as long.
        hidden_dc = jax.lax.optimization_barrier(student.hidden_cd.T)
        added_dv = product("dc,cv->dv", hidden_dc, gradient_cv)
    else:
        added_dv = product("cd,cv->dv", student.hidden_cd, gradient_cv)
    return head_gradient_dv + added_dv, product("cv,dv->cd", gradient_cv, student.head_dv)


class Sweeps(abc.ABC):
    """The sweeps on some hardware, and the matrix products around them; hashable.

    A subclass has the sweeps, which are the functions above. Products before and after them are
    left to XLA, unless it fuses them: then it needs no `statistics`. A chunk of tokens is as long
    as `budget_bytes` of memory allow, at `bytes_per_logit` for each of its (token, vocabulary
    entry) pairs, both models and the gradient included, and preferably a multiple of
    `row_multiple`.
    """

    budget_bytes: int
    bytes_per_logit: int
    row_multiple: int

    def statistics(
        self, logits: Logits, *, temperature: float, entropy: bool = False
    ) -> Statistics:
        raise NotImplementedError

    @abc.abstractmethod
    def term_sums(self, loss: TermSum, logits: Logits, statistics: Statistics) -> PerTerm: ...

    @abc.abstractmethod
    def gradient(
        self, loss: TermSum, logits: Logits, statistics: Statistics, factors: PerTerm, *, dtype
    ) -> jax.Array: ...

    def largest_chunk(self, student: Projection, teacher: Projection | None, columns: int) -> int:
        """Tokens, at so many columns of logits each; of the models only the widths matter."""
        return self._tokens_within_budget(self.bytes_per_logit * columns)

    def _tokens_within_budget(self, bytes_per_token: int) -> int:
        tokens = max(1, self.budget_bytes // bytes_per_token)
        return tokens // self.row_multiple * self.row_multiple or tokens

    def logits_memory(
        self, num_tokens: int, student: Projection, teacher: Projection | None
    ) -> list[jax.Array] | None:
        """Arrays for the loop over chunks to carry, into which `logits_and_statistics` then writes
        the logits of each; None if it makes new ones."""
        return None

    def logits_and_statistics(
        self,
        student: Projection,
        teacher: Projection | None,
        targets_c,
        num_columns,
        memory: list[jax.Array] | None,
        *,
        temperature: float,
        entropy: bool = False,
    ) -> tuple[Logits, Statistics]:
        logits_t_cv = None if teacher is None else teacher.logits()
        logits = Logits(student.logits(), logits_t_cv, targets_c, num_columns, student.soft_cap)
        return logits, self.statistics(logits, temperature=temperature, entropy=entropy)

    def gradient_products(
        self, loss, logits, statistics, factors: PerTerm, student: Projection, head_gradient_dv
    ) -> tuple[jax.Array, jax.Array]:
        dtype = student.hidden_cd.dtype
        gradient_cv = self.gradient(loss, logits, statistics, factors, dtype=dtype)
        return gradient_products(gradient_cv, student, head_gradient_dv)


@dataclasses.dataclass(frozen=True)
class XlaSweeps(Sweeps):
    """The functions of this module, for any platform.

    `strip_logits`, if given, are so many that a few arrays of them fit into a processor's cache: a
    chunk's sums are then made a strip of tokens at a time.
    """

    # Heads and head gradient pass through memory once per chunk, so a chunk wants the few hundred
    # tokens that hide this behind the matrix products: at V=151936 this budget gives 441.
    budget_bytes: int = 1 << 30
    bytes_per_logit: int = 16  # about four float32 blocks are alive at once
    row_multiple: int = 1
    strip_logits: int | None = None

    @classmethod
    def for_cpu(cls) -> XlaSweeps:
        """A CPU makes arrays of most intermediate values: in strips they stay small and in cache.

        64 tokens at V=151936, of both models' logits and the gradient.
        """
        return cls(budget_bytes=120 << 20, bytes_per_logit=12, row_multiple=8, strip_logits=1 << 20)

    def statistics(
        self, logits: Logits, *, temperature: float, entropy: bool = False
    ) -> Statistics:
        sweep = functools.partial(statistics, temperature=temperature, entropy=entropy)
        return self._in_strips(sweep, logits)

    def term_sums(self, loss: TermSum, logits: Logits, statistics: Statistics) -> PerTerm:
        return self._in_strips(functools.partial(term_sums, loss), logits, statistics)

    def gradient(
        self, loss: TermSum, logits: Logits, statistics: Statistics, factors: PerTerm, *, dtype
    ) -> jax.Array:
        # Not in strips: it is one elementwise operation, and in a loop XLA would not share it out
        # over the processor's cores.
        return gradient(loss, logits, statistics, factors, dtype=dtype)

    def _in_strips(self, sweep, logits: Logits, *rows):
        num_tokens, width = logits.student_cv.shape
        largest = num_tokens
        if self.strip_logits is not None:
            largest = min(num_tokens, max(8, self.strip_logits // width))
        size = next(size for size in range(largest, 0, -1) if num_tokens % size == 0)
        if size == num_tokens:
            return sweep(logits, *rows)
        num_columns = logits.num_columns  # the only one that has no row per token

        def strip_sweep(strip):
            return sweep(dataclasses.replace(strip[0], num_columns=num_columns), *strip[1:])

        rows = dataclasses.replace(logits, num_columns=None), *rows
        strips = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
        results = jax.lax.map(strip_sweep, strips)
        return jax.tree.map(lambda x: x.reshape(num_tokens, *x.shape[2:]), results)


def weighted(gradient_cv, weights_c):
    """Rows times weights, where 0 times infinity is 0: a token without weight has no say."""
    return jnp.where(weights_c[:, None] != 0, weights_c[:, None] * gradient_cv, 0.0)


def add_columns(totals: dict, scaled: dict, temperature: float) -> dict:
    """Sums with further columns of the logits, elementwise; how kernels make `Statistics`.

    `totals` as in `relative_to`; `scaled` has lists of logits / temperature by model, MASKED where
    there are none.
    """
    maxima = {
        model: functools.reduce(jnp.maximum, columns, totals[f"max_{model}"])
        for model, columns in scaled.items()
    }
    totals = relative_to(maxima, totals, temperature)
    for k in range(len(scaled["s"])):
        shifted = {model: columns[k] - maxima[model] for model, columns in scaled.items()}
        weight = {model: jnp.exp(x) for model, x in shifted.items()}
        for model in scaled:
            totals[f"sum_{model}"] += weight[model]
            if temperature != 1.0:
                totals[f"plain_sum_{model}"] += jnp.exp(temperature * shifted[model])
        if len(scaled) == 2:
            difference = shifted["t"] - shifted["s"]
            totals["cross_forward"] += weight["t"] * difference
            totals["cross_reverse"] -= weight["s"] * difference
        if "entropy_t" in totals:
            totals["entropy_t"] += weight["t"] * shifted["t"]
    return totals


def relative_to(maxima: dict, totals: dict, temperature: float) -> dict:
    """Sums relative to other maxima than their own: how lanes, tiles and shards are combined.

    `totals` are fields of `Statistics` by name, `maxima` one per model: {"s": ..., "t": ...}.
    """
    moved = {model: totals[f"max_{model}"] - maximum for model, maximum in maxima.items()}
    new = dict(totals)
    for model, maximum in maxima.items():
        new[f"max_{model}"] = maximum
        new[f"sum_{model}"] = totals[f"sum_{model}"] * jnp.exp(moved[model])
        if (name := f"plain_sum_{model}") in totals:
            new[name] = totals[name] * jnp.exp(temperature * moved[model])
    if len(maxima) == 2:
        # The crosses are relative to both maxima: they shift, then rescale.
        for name, own, other in (("cross_forward", "t", "s"), ("cross_reverse", "s", "t")):
            shifted = totals[name] + totals[f"sum_{own}"] * (moved[own] - moved[other])
            new[name] = shifted * jnp.exp(moved[own])
        if "entropy_t" in totals:
            shifted = totals["entropy_t"] + totals["sum_t"] * moved["t"]
            new["entropy_t"] = shifted * jnp.exp(moved["t"])
    return new


def sum_names(num_models: int, temperature: float, entropy: bool) -> tuple[str, ...]:
    """The fields of `Statistics` that a kernel makes: at temperature 1, plain sums are the sums."""
    per_model = ["max", "sum", "target", *([] if temperature == 1.0 else ["plain_sum"])]
    names = [f"{name}_{model}" for model in "st"[:num_models] for name in per_model]
    if num_models == 2:
        names += ["cross_forward", "cross_reverse", *(["entropy_t"] if entropy else [])]
    return tuple(names)


def statistics_of(table_cn, names: tuple[str, ...]) -> Statistics:
    """From a kernel's output: a row per token, a column for each of `sum_names`."""
    fields = {name: table_cn[:, i] for i, name in enumerate(names)}
    for model in "st":
        if f"sum_{model}" in fields:
            fields.setdefault(f"plain_sum_{model}", fields[f"sum_{model}"])
    return Statistics(**fields)


def term_sums_of(table_cn, loss: TermSum) -> PerTerm:
    """From a kernel's output: a row per token, columns for the terms, then for their slopes."""
    number = len(loss.terms)
    return [(table_cn[:, i], table_cn[:, number + i]) for i in range(number)]


def gradient_operands(loss: TermSum, statistics: Statistics, factors: PerTerm) -> jax.Array:
    """What K3 knows of a token, as columns: `row_operands`, then slope sum and weight of each
    term."""
    columns = [(slope_sum_c, weights_c / loss.temperature) for slope_sum_c, weights_c in factors]
    return row_operands(statistics, *(x_c for pair in columns for x_c in pair))


def row_operands(statistics: Statistics, *more_c) -> jax.Array:
    """What K2 knows of a token, as columns: per model, maximum and logarithm of the sum."""
    columns = [statistics.max_s, jnp.log(statistics.sum_s)]
    if statistics.max_t is not None:
        columns += [statistics.max_t, jnp.log(statistics.sum_t)]
    return jnp.stack([*columns, *more_c], axis=1)


def _scaled(logits_cv, num_columns, temperature: float):
    return jnp.where(exists(logits_cv, num_columns), logits_cv / temperature, MASKED)


def _softmax_sums(scaled_cv, temperature: float):
    max_c = jnp.max(scaled_cv, axis=-1)
    shifted_cv = scaled_cv - max_c[:, None]
    sum_c = jnp.sum(jnp.exp(shifted_cv), axis=-1)
    plain_sum_c = sum_c
    if temperature != 1.0:
        plain_sum_c = jnp.sum(jnp.exp(temperature * shifted_cv), axis=-1)
    return max_c, sum_c, plain_sum_c, shifted_cv


def _at_target(logits_cv, targets_c):
    # A masked sum, not a gather: it fuses with the other sums.
    return jnp.sum(jnp.where(_is_target(logits_cv, targets_c), logits_cv, 0.0), axis=-1)


def _terms_and_slopes(loss, logits: Logits, statistics: Statistics):
    """(f and df/dlog_q of every term, log_q) of the columns that both models have; masked ones are
    0, 0 and MASKED."""
    width = min(x_cv.shape[1] for x_cv in logits.models)
    logits_s_cv = logits.student_cv[:, :width]
    log_q_cv = log_probs(logits_s_cv, loss.temperature, statistics.max_s, statistics.sum_s)
    log_p_cv = None
    if logits.teacher_cv is not None:
        logits_t_cv = logits.teacher_cv[:, :width]
        log_p_cv = log_probs(logits_t_cv, loss.temperature, statistics.max_t, statistics.sum_t)
    is_target_cv = _is_target(logits_s_cv, logits.targets_c)
    terms, slopes = terms_and_slopes(loss, log_p_cv, log_q_cv, is_target_cv)
    exists_cv = exists(logits_s_cv, logits.num_columns)
    terms, slopes = jax.tree.map(lambda x_cv: jnp.where(exists_cv, x_cv, 0.0), (terms, slopes))
    return terms, slopes, jnp.where(exists_cv, log_q_cv, MASKED)


def log_probs(logits_cv, temperature: float, max_c, sum_c):
    # The maximum first: next to it, the logarithm would lose digits when logits are large.
    return (logits_cv / temperature - max_c[:, None]) - jnp.log(sum_c)[:, None]


def log_sum_exp(masked_cv, vocab_axes) -> jax.Array:
    """Over the columns of all shards, those that do not count being MASKED; (c,)."""
    max_c = jnp.max(masked_cv, axis=-1)
    max_c = jax.lax.pmax(max_c, vocab_axes) if vocab_axes else max_c
    sum_c = jnp.sum(jnp.exp(masked_cv - max_c[:, None]), axis=-1)
    return max_c + jnp.log(jax.lax.psum(sum_c, vocab_axes) if vocab_axes else sum_c)


def exists(logits_cv, num_columns):
    return _column(logits_cv) < num_columns


def _is_target(logits_cv, targets_c):
    return _column(logits_cv) == targets_c[:, None]


def _column(logits_cv):
    return jax.lax.broadcasted_iota(jnp.int32, logits_cv.shape, 1)
