"""Divergences from a teacher with other ids, against their definition in float64."""

import functools

import jax
import numpy as np
import pytest

from distill.base.mesh import make_mesh
from distill.base.sharding import named_sharding
from distill.kernels.linear_divergence import (
    DivergenceTerm,
    Head,
    RowLoss,
    SharedIds,
    Term,
    TermSum,
    cross_entropy,
    linear_loss,
)
from distill.losses.divergences import get_divergence

TOKENS, STUDENT, TEACHER, TEMPERATURE = 16, 40, 33, 1.3
DIVERGENCES = {name: get_divergence(name) for name in ("forward", "reverse", "jsd")}
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def advantage(statistics, columns):
    return columns["advantage"]


@pytest.fixture(scope="module")
def problem():
    """Hidden states and heads, of which both have padding, targets and weights."""
    rng = np.random.default_rng(0)
    shapes = (TOKENS, 8), (8, STUDENT + 2), (TOKENS, 12), (12, TEACHER + 7)
    arrays = [rng.standard_normal(shape).astype(np.float32) * 0.7 for shape in shapes]
    targets = rng.integers(0, STUDENT, TOKENS).astype(np.int32)
    weights = rng.uniform(0, 1, TOKENS).astype(np.float32)
    weights[3] = 0
    return arrays, targets, weights, rng.standard_normal(TOKENS).astype(np.float32)


def pairs(number=19):
    """So many of the student's ids have one of the teacher's, at another place."""
    found = np.full(STUDENT, -1, np.int32)
    rng = np.random.default_rng(1)
    places = rng.permutation(STUDENT)[:number]
    found[places] = rng.permutation(TEACHER)[:number]
    return found


def run(problem, name, shared, arrays=None, implementation="chunked", caps=(None, None), size=None):
    given, targets, weights, advantages = problem
    hidden_s, head_s, hidden_t, head_t = given if arrays is None else arrays
    terms = Term(DivergenceTerm(DIVERGENCES[name])), Term(cross_entropy, 0.5, advantage)
    loss = TermSum(terms, TEMPERATURE)

    def value(hidden_s, head_s, hidden_t, head_t):
        return linear_loss(
            loss, hidden_s, Head(head_s, caps[0]), hidden_t, Head(head_t, caps[1]), weights,
            targets=targets, columns={"advantage": advantages}, shared=shared,
            vocab_size=size or STUDENT, implementation=implementation, chunk=6,
        )  # fmt: skip

    program = compiled(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    return program(hidden_s, head_s, hidden_t, head_t)


def softmax64(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def expected64(problem, name, paired):
    """Values of the divergence, its gradient by the student's hidden states, log-probabilities."""
    (hidden_s, head_s, hidden_t, head_t), targets, _, _ = problem
    logits_s = hidden_s.astype(np.float64) @ head_s.astype(np.float64)[:, :STUDENT]
    logits_t = hidden_t.astype(np.float64) @ head_t.astype(np.float64)[:, :TEACHER]
    q, p = softmax64(logits_s / TEMPERATURE), softmax64(logits_t / TEMPERATURE)
    # Which outcome each id is: a pair has one of its own, and the last is the bucket's.
    ours = np.flatnonzero(paired >= 0)
    to_s, to_t = np.zeros((STUDENT, len(ours) + 1)), np.zeros((TEACHER, len(ours) + 1))
    to_s[:, -1], to_t[:, -1] = 1, 1
    for number, i in enumerate(ours):
        to_s[i], to_t[paired[i]] = np.eye(len(ours) + 1)[[number, number]]
    merged_q, merged_p = q @ to_s, p @ to_t
    ratio = np.log(merged_p / merged_q)
    if name == "forward":
        values, slopes = merged_p * ratio, -merged_p / merged_q
    elif name == "reverse":
        values, slopes = -merged_q * ratio, 1 - ratio
    else:
        m = (merged_p + merged_q) / 2
        values = (merged_p * np.log(merged_p / m) + merged_q * np.log(merged_q / m)) / 2
        slopes = np.log(merged_q / m) / 2
    by_q = slopes @ to_s.T
    by_logits = q * (by_q - (q * by_q).sum(axis=1, keepdims=True)) / TEMPERATURE
    of_target = (softmax64(logits_t) @ to_t @ to_s.T)[np.arange(TOKENS), targets]
    return values.sum(axis=1), by_logits, np.log(of_target), np.log(softmax64(logits_s))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_definition(problem, name, implementation):
    arrays, targets, weights, advantages = problem
    shared = SharedIds.of_pairs(pairs(), TEACHER)
    (_, found), (by_hidden, by_head) = run(problem, name, shared, implementation=implementation)
    values, by_logits, log_p, log_q = expected64(problem, name, pairs())
    counts = weights != 0
    np.testing.assert_allclose(found.terms[0][counts], values[counts], rtol=2e-5)
    np.testing.assert_allclose(found.log_prob_t[counts], log_p[counts], rtol=2e-5)
    of_target = log_q[np.arange(TOKENS), targets]
    np.testing.assert_allclose(found.log_prob_s[counts], of_target[counts], rtol=2e-5)
    tempered = softmax64(log_q / TEMPERATURE) - np.eye(STUDENT)[targets]
    by_logits = by_logits + 0.5 * advantages[:, None] * tempered / TEMPERATURE
    by_logits = by_logits * weights[:, None]
    head_s, hidden_s = arrays[1][:, :STUDENT], arrays[0]
    np.testing.assert_allclose(by_hidden, by_logits @ head_s.T, atol=3e-6)
    np.testing.assert_allclose(by_head[:, :STUDENT], hidden_s.T @ by_logits, atol=3e-6)
    assert not np.asarray(by_head[:, STUDENT:]).any()


@pytest.mark.parametrize("name", ["forward", "jsd"])
def test_where_all_ids_are_shared_the_loss_is_the_plain_one(problem, name):
    """The teacher's columns stand in another order, which the pairs undo."""
    arrays, targets, weights, advantages = problem
    order = np.random.default_rng(2).permutation(TEACHER)
    targets = targets % TEACHER
    plain = run((arrays, targets, weights, advantages), name, None, size=TEACHER)
    mixed = [*arrays[:3], arrays[3][:, order]]
    shared = SharedIds.of_pairs(np.argsort(order).astype(np.int32), TEACHER)
    found = run((mixed, targets, weights, advantages), name, shared, size=TEACHER)
    for actual, expected in zip(*map(jax.tree.leaves, (found, plain)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("paired", [pairs(), np.arange(20)], ids=["some", "all of fewer"])
def test_on_a_mesh(problem, paired):
    """Tokens over data and fsdp, vocabulary over tensor; logits are capped."""
    size = len(paired)
    shared = SharedIds.of_pairs(paired.astype(np.int32), TEACHER)
    arrays, targets, *rest = problem
    problem = arrays, targets % size, *rest
    options = dict(caps=(3.0, 2.0), size=size)
    plain = run(problem, "jsd", shared, **options)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        tokens = named_sharding(mesh, "token", None)
        heads = [named_sharding(mesh, axis, "vocab") for axis in ("embed", None)]
        layouts = tokens, heads[0], tokens, heads[1]
        placed = [jax.device_put(x, each) for x, each in zip(arrays, layouts, strict=True)]
        sharded = run(problem, "jsd", shared, placed, **options)
    for actual, expected in zip(*map(jax.tree.leaves, (sharded, plain)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6)


def test_what_cannot_run_is_refused(problem):
    shared = SharedIds.of_pairs(pairs(), TEACHER)
    with pytest.raises(ValueError, match="nor a top-k teacher or one with another tokenizer"):
        run(problem, "jsd", shared, implementation="pallas")
    arrays, targets, weights, _ = problem
    loss = RowLoss(lambda log_p, log_q, targets: log_p.sum(axis=1))
    with pytest.raises(ValueError, match="takes no teacher of other ids"):
        linear_loss(loss, *arrays, weights, shared=shared, vocab_size=STUDENT)
