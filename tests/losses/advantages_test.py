"""Advantages: their formulas in float64, and gradients against what they estimate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.objectives import objective_of
from distill.base.errors import UserError
from distill.kernels.linear_divergence import TokenStatistics
from distill.losses.advantages import Advantage
from distill.rollout.rewards import describe_rewards, group_advantages

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize("standardize", [False, True])
def test_groups_are_compared_with_their_own_mean(standardize):
    first = REWARDS[:4] - 0.5
    expected = [*(first / 0.5 if standardize else first), 0, 0, 0, 0]
    found = group_advantages(REWARDS, 4, standardize=standardize)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_what_is_said_of_rewards():
    measured = describe_rewards(REWARDS, 4)
    assert measured == {
        "reward/mean": 1.75,
        "reward/group_std": 0.25,
        "reward/groups_without_spread": 0.5,
    }


def test_expected_gradient_of_groups_is_the_policy_gradient():
    """Over all pairs of four responses: times 1 - 1/2, since the mean has the own reward."""
    rng = np.random.default_rng(0)
    logits, rewards = rng.standard_normal(4), rng.standard_normal(4)
    q = np.exp(logits) / np.exp(logits).sum()
    scores = np.eye(4) - q  # d log q(y) / d logits
    found = np.zeros(4)
    for pair in itertools.product(range(4), repeat=2):
        advantages = group_advantages(rewards[list(pair)], 2)
        found += q[list(pair)].prod() * (advantages @ scores[list(pair)]) / 2
    expected = q * (rewards - q @ rewards)  # of sum_y q(y) R(y)
    np.testing.assert_allclose(found, expected / 2, atol=1e-7)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(1)
    log_q, log_p, log_old = -rng.uniform(0.1, 2.0, (3, 40))
    log_old[:5] = log_q[:5]
    columns = dict(
        advantage=rng.standard_normal(40), sampled=rng.random(40) < 0.8, log_prob=log_old
    )
    return log_q, log_p, columns


def weight_of(advantage, tokens):
    log_q, log_p, columns = tokens
    arrays = {name: jnp.asarray(x) for name, x in columns.items()}
    return np.asarray(advantage(TokenStatistics(jnp.float32(log_q), jnp.float32(log_p)), arrays))


def test_teacher_and_reward_are_added(tokens):
    log_q, log_p, columns = tokens
    expected = 0.5 * columns["advantage"] + 2.0 * (log_p - log_q)
    found = weight_of(Advantage(0.5, 2.0), tokens)
    np.testing.assert_allclose(found, np.where(columns["sampled"], expected, 0), atol=1e-6)


def test_clip_is_the_gradient_of_ppo(tokens):
    """The weight times the ratio is the derivative of min(rho A, clip(rho, 1 - e, 1 + e) A)."""
    log_q, _, columns = tokens
    advantage = columns["advantage"]

    def surrogate(log_q):
        ratio = jnp.exp(log_q - columns["log_prob"])
        return jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage).sum()

    expected = np.where(columns["sampled"], jax.grad(surrogate)(jnp.float32(log_q)), 0)
    ratio = np.exp(log_q - columns["log_prob"])
    found = ratio * weight_of(Advantage(1.0, ratio_clip=0.2), tokens)
    assert 5 < (found == 0).sum() < 35
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_teacher_that_holds_the_student_bounds_its_advantage(tokens):
    """TOP-D: log(0.3 p/q + 0.7), never below log 0.7."""
    log_q, log_p, columns = tokens
    found = weight_of(Advantage(teacher=2.0, proximal_share=0.3), tokens)
    expected = 2.0 * np.log(0.3 * np.exp(log_p - log_q) + 0.7)
    np.testing.assert_allclose(found, np.where(columns["sampled"], expected, 0), atol=1e-5)


def test_ratio_of_the_policy_gradient_alone(tokens):
    log_q, _, columns = tokens
    ratio = np.minimum(np.exp(log_q - columns["log_prob"]), 1.5)
    plain, clipped = Advantage(1.0, 0.5, 0.2), Advantage(1.0, 0.5, 0.2, importance_clip=1.5)
    expected = np.where(columns["sampled"], ratio, 1.0) * weight_of(plain, tokens)
    np.testing.assert_allclose(weight_of(clipped, tokens), expected, rtol=1e-5)
    dense = objective_of(
        reward_advantage=1.0, teacher_advantage=0.5, ratio_clip=0.2, own_importance_clip=1.5
    )
    assert [term.weight for term in dense.loss.terms] == [None, clipped]
    assert not dense.loss.weights and dense.importance_clip == 1.5  # which the log says


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(divergence=0.0), "objective has no term: give divergence, cross_entropy"),
        (dict(kl_type="k1"), "kl_type=k1 is refused: .* gradient of zero: .*teacher_advantage=1"),
        (dict(kl_type="k2"), "kl_type=k2 is refused: .*teacher_advantage=1"),
        (dict(kl_type="low_var_kl"), "kl_type=low_var_kl is refused: .*the forward KL's"),
        (dict(terms=("k3:0.1",)), "objective.terms=k3 is refused: .*the forward KL's"),
        (dict(terms=("top_k",)), "terms=top_k is refused: .*renormalised, is none"),
        (dict(terms=("top_k_advantage",)), "terms=top_k_advantage is refused: .*is zero"),
    ],
)
def test_what_estimates_nothing_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words) as error:
        objective_of(**dict(kl_type="forward") | options)
    assert "\n" not in str(error.value)


def test_only_what_has_a_weight_is_computed():
    alone = objective_of(divergence=0.0, reward_advantage=1.0)
    assert len(alone.loss.terms) == 1 and alone.divergence is None and not alone.needs_teacher
    assert alone.alone.loss.terms[0].weight is None
    assert objective_of("jsd", divergence=0.5).alone == objective_of("jsd")
