"""benchmarks/estimators: what is known of estimators comes out, and the page has its numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from step_test import make_model

from benchmarks.estimators import report
from benchmarks.estimators.estimators import (
    FORWARD,
    REVERSE,
    all_estimators,
    exact,
    likeliest,
    top_k,
)
from benchmarks.estimators.measure import (
    Pair,
    States,
    _squared_mean,
    measure_spans,
    measure_states,
    span_sums,
)
from benchmarks.evidence.report import fill
from distill.data.sequences import Sequences
from distill.kernels.linear_divergence import Head, linear_loss
from distill.models.model import Model

T, V = 6, 9


@pytest.fixture(scope="module")
def states():
    """Logits as hidden states: heads that change nothing."""
    rng = np.random.default_rng(0)
    hidden = (jnp.asarray(2 * rng.standard_normal((T, V)), jnp.float32) for _ in range(2))
    return States(*hidden, Head(jnp.eye(V)), Head(jnp.eye(V)), np.arange(T) // 2)


@pytest.fixture(scope="module")
def rows(states):
    found = measure_states(states, [e for e in all_estimators(V) if not e.k])
    return {row["name"]: row for row in found}


@pytest.mark.parametrize(
    "name, bias, claims",
    [
        ("k1 as a loss", 1, None),
        ("k2 as a loss", 0, REVERSE),
        ("k3 as a loss", None, FORWARD),
        ("advantage log p - log q", 0, REVERSE),
        ("the same less batch mean", 0, REVERSE),
        ("the same less state mean", 0, REVERSE),
        ("advantage: top 4 KL of the place", 1, None),
    ],
)
def test_what_the_mean_of_a_sampled_estimator_is(rows, name, bias, claims):
    row = rows[name]
    if bias is not None:
        assert row["bias"][0] == pytest.approx(bias, abs=1e-5)
    for each in (REVERSE, FORWARD):
        cosine = row[f"cosine_{each}"][0]
        assert (cosine > 1 - 1e-5) == (each == claims)
        assert claims or cosine == 0
    assert row["noise"][0] > 0.1


def test_a_mean_of_the_state_takes_noise_away(rows):
    noise = [rows[f"the same less {each} mean"]["noise"][0] for each in ("batch", "state")]
    assert noise[1] < noise[0] and noise[1] < rows["advantage log p - log q"]["noise"][0]
    assert rows["k2 as a loss"]["noise"] == pytest.approx(
        rows["advantage log p - log q"]["noise"], rel=1e-4
    )


@pytest.mark.parametrize("name", ["k3 as a loss", "the same less state mean"])
def test_mean_and_variance_are_those_of_the_losses_over_all_tokens(states, name):
    (estimator,) = (each for each in all_estimators(V) if each.name == name)
    gradients_vtd = jnp.stack(
        [
            states.gradient_at(estimator, states.hidden_t_td, states.head_t, jnp.full(T, token))
            for token in range(V)
        ]
    )
    q_vt1 = jnp.exp(states.log_probs[1]).T[..., None]
    mean_td = (q_vt1 * gradients_vtd).sum(0)
    variance_t = (q_vt1 * (gradients_vtd - mean_td) ** 2).sum((0, 2))
    found = states.gradient(estimator)
    for value, expected in zip(found, (mean_td, variance_t), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("claims", [REVERSE, FORWARD])
def test_all_of_the_teachers_tokens_are_exact_and_buckets_lower_bounds(states, claims):
    oracle, _ = states.gradient(exact(claims))
    for kind in ("plain", "renormalised", "bucket"):
        found, _ = states.gradient(top_k(kind, claims, V))
        np.testing.assert_allclose(found, oracle, rtol=1e-3, atol=1e-5)

    def values(teacher, head_t=None):
        arrays = states.hidden_s_td, states.head_s, teacher, head_t, jnp.ones(T)
        return linear_loss(exact(claims).loss, *arrays, vocab_size=V)[1].divergence

    log_p_tv, _ = states.log_probs
    bounds = [values(likeliest(k)(log_p_tv)) for k in (1, 2, 4)]
    bounds.append(values(states.hidden_t_td, states.head_t))
    assert all((low < high + 1e-5).all() for low, high in zip(bounds, bounds[1:], strict=False))


def test_span_advantage_is_unbiased_for_the_text():
    """Of all texts of two tokens, on a tiny model; and it is not on-policy distillation's."""
    models = [Model(*make_model(8, 1, 5, seed=seed)) for seed in (0, 1)]
    sequences = Sequences.of_tokens(
        [[1, 2, 3, 4, 1]], weight=[0, 0, 1, 1, 1], sampled=[False, False, True, True, True]
    )
    found = measure_spans(Pair(*models, sequences, 5, 0), (2,), 1)
    bias = {row["name"]: row["bias"] for row in found}
    assert bias["span advantage, of the text"] < 1e-3 < bias["span advantage, of the places"]
    assert bias["places, of the text"] > 1e-3


def test_span_sums_and_squared_means():
    mask_bt = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
    values_bt = np.arange(10.0).reshape(2, 5) * mask_bt
    expected = [[0, 3, 3, 3, 0], [11, 11, 0, 0, 0]]
    np.testing.assert_array_equal(span_sums(values_bt, mask_bt, 2), expected)
    samples = 1 + np.random.default_rng(0).standard_normal((4000, 3))
    square, variance = _squared_mean(samples @ samples.T, np.ones(4000))
    assert (square, variance) == (pytest.approx(3, rel=0.05), pytest.approx(3, rel=0.05))


def test_the_committed_page_has_the_committed_numbers():
    page = (report.DOCS / "estimators.md").read_text()
    assert fill(page, report.page_tables()) == page
