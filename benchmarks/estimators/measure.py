"""Gradients of estimators on responses that a student has sampled, and what they say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from benchmarks.estimators.estimators import (
    FORWARD,
    REVERSE,
    TOP_K_ADVANTAGE,
    Estimator,
    all_estimators,
    exact,
    expectation,
    slopes,
    top_k,
)
from benchmarks.objectives import objective_of
from distill.batches.packing import Layout, Shape
from distill.batches.rows import Rows, make_batch
from distill.data.sequences import Sequences
from distill.kernels.linear_divergence import Head, linear_loss
from distill.models.model import Model

UNIT = 8  # responses of which gradients by the parameters are kept
RESAMPLES = 1000

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Student and teacher, and responses of the student with their prompts."""

    student: Model
    teacher: Model
    sequences: Sequences
    vocab_size: int
    pad_id: int

    def rows(self, sequences: Sequences, number: int) -> Rows:
        """Stacked microbatches of so many sequences each."""
        longest = max(self.sequences.lengths_b.max(), sequences.lengths_b.max())
        layout = Layout((Shape(number, int(longest)),))
        (rows,) = make_batch(sequences, layout=layout, pad_id=self.pad_id)
        return rows

    @functools.cached_property
    def heads(self) -> tuple[Head, Head]:
        return tuple(
            nnx.merge(each.graph, each.params).head().cut(self.vocab_size)
            for each in (self.student, self.teacher)
        )

    @functools.cached_property
    def hidden(self):
        """Jitted: rows -> final hidden states of both models."""

        @jax.jit
        def run(student, teacher, tokens_bt):
            models = (self.student.graph, student), (self.teacher.graph, teacher)
            return [nnx.merge(*each)(tokens_bt) for each in models]

        return lambda tokens_bt: run(self.student.params, self.teacher.params, tokens_bt)


@dataclasses.dataclass(frozen=True)
class States:
    """Places of responses: hidden states of both models, and the response of each."""

    hidden_s_td: jax.Array
    hidden_t_td: jax.Array
    head_s: Head
    head_t: Head
    response_t: np.ndarray

    @functools.cached_property
    def log_probs(self) -> tuple[jax.Array, jax.Array]:
        """log p_tv and log q_tv."""
        pairs = (self.head_t, self.hidden_t_td), (self.head_s, self.hidden_s_td)
        log_p_tv, log_q_tv = (jax.nn.log_softmax(head.logits(hidden)) for head, hidden in pairs)
        return log_p_tv, log_q_tv

    @functools.cached_property
    def columns(self) -> dict[str, jax.Array]:
        """What the estimators' weights read."""
        log_p_tv, log_q_tv = self.log_probs
        kl_t = jnp.sum(jnp.exp(log_q_tv) * (log_q_tv - log_p_tv), axis=1)
        ones_t = jnp.ones_like(kl_t)
        of_top = top_k("plain", REVERSE, TOP_K_ADVANTAGE).loss.loss_fn(log_p_tv, log_q_tv, None)
        return dict(baseline=-kl_t.mean() * ones_t, top_k_kl=of_top, sampled=ones_t > 0)

    def gradient(self, estimator: Estimator) -> tuple[jax.Array, jax.Array]:
        """Expected gradient by the student's hidden states, and its variance: (t, d), (t,)."""
        log_p_tv, log_q_tv = self.log_probs
        if estimator.is_sampled:
            slope_tv = slopes(estimator, log_p_tv, log_q_tv, self.columns)
            return expectation(slope_tv, log_q_tv, self.head_s.weights_dv)
        known = estimator.known
        teacher = self.hidden_t_td if known is None else known(log_p_tv)
        zero_t = jnp.zeros(len(log_q_tv))
        return self.gradient_at(estimator, teacher, None if known else self.head_t), zero_t

    def gradient_at(self, estimator, teacher, head_t, targets_t=None) -> jax.Array:
        """Gradient by the hidden states, of the project's loss."""

        def loss(hidden_s_td):
            return linear_loss(
                estimator.loss,
                hidden_s_td,
                self.head_s,
                teacher,
                head_t,
                jnp.ones(len(hidden_s_td)),
                targets=targets_t,
                columns=self.columns,
                vocab_size=self.head_s.weights_dv.shape[1],
                implementation="reference",
            )[0]

        return jax.grad(loss)(self.hidden_s_td)


def find_states(pair: Pair) -> States:
    """All places of the responses."""
    rows = pair.rows(pair.sequences, UNIT)
    found: list[list[np.ndarray]] = [[], [], []]
    mask_mbt, sequences_mb = np.asarray(rows.mask_bt), np.cumsum(rows.sequences_b).reshape(-1, UNIT)
    for tokens_bt, mask_bt, number_b in zip(rows.tokens_bt, mask_mbt, sequences_mb, strict=True):
        hidden = pair.hidden(tokens_bt)
        for kept, values in zip(found, hidden, strict=False):
            kept.append(np.asarray(values)[mask_bt])
        found[2].append(np.broadcast_to(number_b[:, None], mask_bt.shape)[mask_bt] - 1)
    hidden_s, hidden_t, response_t = map(np.concatenate, found)
    return States(jnp.asarray(hidden_s), jnp.asarray(hidden_t), *pair.heads, response_t)


def measure_states(states: States, estimators: Sequence[Estimator]) -> list[Row]:
    """Bias, noise and cosines in the mean over all places; nothing is sampled but the places."""
    oracles = {claims: states.gradient(exact(claims))[0] for claims in (REVERSE, FORWARD)}
    number = int(states.response_t.max()) + 1
    draws_rb = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    draws_rb = np.concatenate([np.ones((1, number)), draws_rb])

    def total(values_t) -> np.ndarray:
        """Of all responses, and of each resample."""
        values_t = np.asarray(values_t, np.float64)
        return draws_rb @ np.bincount(states.response_t, values_t, number)

    def dot(a_td, b_td) -> np.ndarray:
        return total(jnp.sum(a_td * b_td, axis=1))

    found = []
    for estimator in estimators:
        if estimator.span:
            continue
        mean_td, variance_t = states.gradient(estimator)
        oracle_td = oracles[estimator.claims]
        size = dot(oracle_td, oracle_td)
        own = np.maximum(dot(mean_td, mean_td), 1e-30)
        row: Row = dict(name=estimator.name, claims=estimator.claims, k=estimator.k)
        row["estimates"] = estimator.estimates
        row["bias"] = _spread(np.sqrt(dot(mean_td - oracle_td, mean_td - oracle_td) / size))
        row["noise"] = _spread(np.sqrt(total(variance_t) / size))
        for claims, oracle_td in oracles.items():
            cosine = dot(mean_td, oracle_td) / np.sqrt(own * dot(oracle_td, oracle_td))
            row[f"cosine_{claims}"] = _spread(np.where(own < 1e-9 * size, 0.0, cosine))
        found.append(row)
    return found


def _spread(values: np.ndarray) -> list[float]:
    """The first, with the 95% interval of the others."""
    return [float(values[0]), *map(float, np.quantile(values[1:], (0.025, 0.975)))]


# --------------------------------------------------------------------------- by the parameters


def span_sums(values_bt: np.ndarray, mask_bt: np.ndarray, span: int) -> np.ndarray:
    """In every place the sum over its span, spans being cut from a response's first token on."""
    number_bt = np.where(mask_bt, (np.cumsum(mask_bt, axis=1) - 1) // span, -1)
    found = np.zeros_like(values_bt)
    for number in range(number_bt.max() + 1):
        inside_bt = number_bt == number
        found += inside_bt * (values_bt * inside_bt).sum(axis=1, keepdims=True)
    return found


class Gradients:
    """Gradients by the student's parameters of microbatches."""

    def __init__(self, pair: Pair):
        self._pair = pair
        objective = objective_of(REVERSE, loss_implementation="chunked")
        self._log_probs = jax.jit(functools.partial(self._loss, objective, pair.student.params))

    def ratios(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """log p - log q and log q of the targets, (b, t), 0 where nothing is trained on."""
        teacher = self._pair.teacher.params
        _, values = self._log_probs(teacher, rows, rows.mask_bt.astype(jnp.float32), None)
        log_q_bt = np.asarray(values.log_prob_s)
        return np.asarray(values.log_prob_t) - log_q_bt, log_q_bt

    @functools.cached_property
    def of_text(self):
        """Jitted: rows -> gradient of sum_y q(y) (log q(y) - log p(y)), by its definition.

        The sum is over the rows' responses.
        """
        pair = self._pair

        def log_prob(model: Model, params, rows: Rows) -> jax.Array:
            module = nnx.merge(model.graph, params)
            logits_btv = module.logits(module(rows.tokens_bt))[..., : pair.vocab_size]
            log_q_btv = jax.nn.log_softmax(logits_btv)
            picked_btv = jnp.take_along_axis(log_q_btv, rows.targets_bt[..., None], axis=2)
            return jnp.sum(picked_btv[..., 0] * rows.mask_bt, axis=1)

        @jax.jit
        def gradient(params, teacher, rows: Rows):
            def loss(params):
                log_q_b = log_prob(pair.student, params, rows)
                log_p_b = log_prob(pair.teacher, teacher, rows)
                return jnp.sum(jnp.exp(log_q_b) * (log_q_b - log_p_b))

            return ravel_pytree(jax.grad(loss)(params))[0]

        return lambda rows: gradient(pair.student.params, pair.teacher.params, rows)

    def of(self, estimator: Estimator):
        """Jitted: (rows, weights_bt) -> the gradient as one vector."""
        objective = objective_of(REVERSE, loss_implementation="chunked")
        objective = dataclasses.replace(objective, loss=estimator.loss)

        @jax.jit
        def gradient(params, teacher, rows, weights_bt):
            def loss(params):
                return self._loss(objective, params, teacher, rows, weights_bt, estimator.known)[0]

            return ravel_pytree(jax.grad(loss)(params))[0]

        pair = self._pair
        return lambda *batch: gradient(pair.student.params, pair.teacher.params, *batch)

    def _loss(self, objective, params, teacher, rows: Rows, weights_bt, known):
        student, teacher = (
            nnx.merge(model.graph, each)
            for model, each in ((self._pair.student, params), (self._pair.teacher, teacher))
        )
        hidden_s, hidden_t = student(rows.tokens_bt), teacher(rows.tokens_bt)
        head_t, vocab_size, scores = teacher.head(), self._pair.vocab_size, None
        columns = dict(rows.columns)
        logits = [
            h.cut(vocab_size).logits(x) for h, x in ((head_t, hidden_t), (student.head(), hidden_s))
        ]
        log_p, log_q = (jax.nn.log_softmax(each) for each in jax.lax.stop_gradient(logits))
        columns["top_k_kl"] = _top_k_kl(log_p, log_q)
        if known is not None:
            scores = known(log_p)
        arrays = hidden_s, student.head(), hidden_t, head_t, rows.targets_bt, weights_bt
        return objective(*arrays, vocab_size=vocab_size, scores=scores, columns=columns)


def _top_k_kl(log_p_btv, log_q_btv) -> jax.Array:
    loss = top_k("plain", REVERSE, TOP_K_ADVANTAGE).loss.loss_fn
    flat = [x.reshape(-1, x.shape[-1]) for x in (log_p_btv, log_q_btv)]
    return loss(*flat, None).reshape(log_p_btv.shape[:-1])


def measure_batches(pair: Pair, estimators: Sequence[Estimator], sizes: Sequence[int]) -> list[Row]:
    """Errors of the gradient by the parameters in batches of so many responses.

    With unbiased estimates of what the units' gradients say: with g a unit's gradient and d its
    difference from the exact one, ||E d||^2 is ||mean d||^2 less the variance of that mean.
    """
    stacked = pair.rows(pair.sequences, UNIT)
    units = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(stacked.tokens_bt))]
    gradients = Gradients(pair)
    tokens = np.mean([unit.mask_bt.sum() for unit in units])
    ratios = [gradients.ratios(unit)[0] for unit in units]

    def of_units(estimator: Estimator) -> np.ndarray:
        function, found = gradients.of(estimator), []
        for unit, ratio_bt in zip(units, ratios, strict=True):
            mask_bt = np.asarray(unit.mask_bt)
            advantage_bt = span_sums(ratio_bt, mask_bt, estimator.span or 1)
            columns = unit.columns | dict(
                advantage=jnp.asarray(advantage_bt, jnp.float32),
                baseline=jnp.full(mask_bt.shape, ratio_bt.sum() / mask_bt.sum(), jnp.float32),
            )
            rows = dataclasses.replace(unit, columns=columns)
            found.append(np.asarray(function(rows, mask_bt / np.float32(tokens))))
        return np.stack(found)

    oracles = {claims: of_units(exact(claims)) for claims in (REVERSE, FORWARD)}
    found = []
    for estimator in estimators:
        oracle = oracles[estimator.claims]
        values = oracle if estimator == exact(estimator.claims) else of_units(estimator)
        found.append(
            dict(name=estimator.name, claims=estimator.claims, **_errors(values, oracle, sizes))
        )
    return found


def _errors(values_up: np.ndarray, oracle_up: np.ndarray, sizes: Sequence[int]) -> Row:
    """Relative bias, and root mean square errors by batch size, each with its interval."""
    number = len(values_up)
    both = np.concatenate([values_up, oracle_up])
    gram = (both @ both.T).astype(np.float64)
    own, cross, exact_ = gram[:number, :number], gram[:number, number:], gram[number:, number:]
    difference = own + exact_ - cross - cross.T
    rng = np.random.default_rng(0)
    draws = rng.multinomial(number, np.full(number, 1 / number), RESAMPLES)
    found: dict[str, list[float]] = {"bias": [], **{str(size): [] for size in sizes}}
    for draw in (np.ones(number), *draws):
        size2 = max(_squared_mean(exact_, draw)[0], 1e-30)
        bias2, _ = _squared_mean(difference, draw)
        _, variance = _squared_mean(own, draw)
        found["bias"].append(np.sqrt(max(bias2, 0.0) / size2))
        for size in sizes:
            error2 = max(bias2, 0.0) + variance * UNIT / size
            found[str(size)].append(np.sqrt(error2 / size2))
    return {name: _spread(np.array(values)) for name, values in found.items()}


def _squared_mean(gram: np.ndarray, draw: np.ndarray) -> tuple[float, float]:
    """||E x||^2 without bias, and the variance of x, from inner products of samples.

    Of a resample, pairs of the same sample are left out: they are not independent.
    """
    number = draw.sum()
    square = draw @ np.diag(gram) / number
    pairs = draw @ gram @ draw - draw**2 @ np.diag(gram)
    squared_mean = pairs / (number**2 - (draw**2).sum())
    return float(squared_mean), float(square - squared_mean)


def measure_spans(pair: Pair, spans: Sequence[int], places: int) -> list[Row]:
    """Expected gradients of span advantages over all texts of so many tokens, by enumeration.

    Oracles: the gradient of the text's reverse KL, which knows what a token does to later ones, by
    its definition; and that of the places' own reverse KLs, which is on-policy distillation's.
    """
    gradients, vocab = Gradients(pair), range(pair.vocab_size)
    rng, found = np.random.default_rng(0), []
    policy_gradient = next(e for e in all_estimators(pair.vocab_size) if e.span)
    exact_, estimate = gradients.of(exact(REVERSE)), gradients.of(policy_gradient)
    prompts = pair.sequences.prompts()
    chosen = rng.permutation(len(prompts))[:places]
    for span in spans:
        sums = np.zeros((3, 2))
        for number in chosen:
            before = _beginning(pair.sequences, prompts, int(number), span, rng)
            texts = np.stack(np.meshgrid(*[vocab] * span, indexing="ij"), -1).reshape(-1, span)
            whole = Sequences.of_tokens(
                [np.concatenate([before, text]) for text in texts], sampled=True
            )
            weight = np.concatenate([np.r_[0 * before, np.ones(span)] for _ in texts])
            rows = pair.rows(whole.with_columns(weight=weight), len(texts))
            rows = jax.tree.map(lambda x: x[0], rows)
            ratio_bt, log_q_bt = gradients.ratios(rows)
            q_bt = np.exp(log_q_bt.sum(axis=1, keepdims=True)) * np.asarray(rows.mask_bt)
            advantage = span_sums(ratio_bt, np.asarray(rows.mask_bt), span)
            columns = rows.columns | dict(advantage=jnp.asarray(advantage, jnp.float32))
            rows = dataclasses.replace(rows, columns=columns)
            made, of_places = estimate(rows, q_bt), exact_(rows, q_bt)
            of_text = gradients.of_text(rows)
            for i, (value, oracle) in enumerate(
                ((made, of_text), (made, of_places), (of_places, of_text))
            ):
                sums[i] += np.sum((value - oracle) ** 2), np.sum(oracle**2)
        names = (
            "span advantage, of the text",
            "span advantage, of the places",
            "places, of the text",
        )
        bias = np.sqrt(sums[:, 0] / sums[:, 1])
        found += [dict(name=n, span=span, bias=float(x)) for n, x in zip(names, bias, strict=True)]
    return found


def _beginning(sequences, prompts, number: int, span: int, rng) -> np.ndarray:
    """A prompt with a random part of its response."""
    tokens = sequences.split("tokens")[number]
    most = max(len(tokens) - span, prompts.lengths_b[number] + 1)
    return tokens[: rng.integers(prompts.lengths_b[number], most)]
