"""Token choice: frequencies, support and log-probabilities against exact distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from distill.base.errors import UserError
from distill.sampling.choice import SamplingParams, choose, row_keys, uniforms

TRUNCATIONS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "top_k_and_top_p": {"top_k": 5, "top_p": 0.7},
    "combined": {"temperature": 1.5, "top_k": 7, "top_p": 0.85, "min_p": 0.3},
}
each_truncation = pytest.mark.parametrize("options", TRUNCATIONS.values(), ids=TRUNCATIONS.keys())


def reference_distribution(logits_v, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution after all warpers, in float64, one token at a time."""

    def renormalised(ids):
        weight_v = np.zeros_like(logits_v, np.float64)
        weight_v[ids] = np.exp(logits_v[ids].astype(np.float64) / temperature)
        return weight_v / weight_v.sum()

    ids = sorted(range(len(logits_v)), key=lambda i: -logits_v[i])
    ids = ids[:top_k] if top_k else ids
    prob_v, kept, total = renormalised(ids), [], 0.0
    for i in ids:
        if total < top_p:
            kept.append(i)
            total += prob_v[i]
    prob_v = renormalised(kept)
    return renormalised([i for i in kept if prob_v[i] >= min_p * prob_v.max()])


class TestSamplingParams:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("max_length", 0),
            ("max_length", 2.5),
            ("max_length", True),
            ("greedy", 1),
            ("temperature", 0.0),
            ("temperature", -1.0),
            ("temperature", float("inf")),
            ("temperature", float("nan")),
            ("top_k", -1),
            ("top_k", 1.5),
            ("top_p", 0.0),
            ("top_p", 1.01),
            ("top_p", float("nan")),
            ("min_p", -0.1),
            ("min_p", 1.1),
        ],
    )
    def test_impossible_value_is_named_with_what_is_allowed(self, name, value):
        with pytest.raises(UserError) as error:
            SamplingParams(**{"max_length": 4, name: value})
        assert f"{name}={value!r}: must be " in str(error.value)
        assert "\n" not in str(error.value)

    def test_extremes_are_allowed(self):
        SamplingParams(max_length=1, temperature=1e-6, top_k=10**6, top_p=1e-9, min_p=1.0)


class TestRowKeys:
    def test_every_index_matters(self):
        base = (0, 0, np.array([0]), np.array([0]))
        changed = [tuple(x + (i == j) for j, x in enumerate(base)) for i in range(4)]
        keys = [
            tuple(jax.random.key_data(row_keys(*args))[0].tolist()) for args in [base, *changed]
        ]
        assert len(set(keys)) == 5

    def test_row_and_batch_do_not_matter(self):
        together = row_keys(3, 7, np.array([4, 9, 4]), np.array([1, 0, 2]))
        alone = row_keys(3, 7, np.array([9]), np.array([0]))
        assert jax.random.key_data(together)[1].tolist() == jax.random.key_data(alone)[0].tolist()

    def test_wide_integers_and_traced_ones_agree(self):
        wide = row_keys(2**40 + 1, 2**33, np.array([2**31 + 5]), np.array([2**32 + 2]))
        traced = jax.jit(row_keys)(1, 0, jnp.uint32([2**31 + 5]), jnp.uint32([2]))
        assert jax.random.key_data(wide).tolist() == jax.random.key_data(traced).tolist()


GOLDEN = (0.6497509479522705, 0.9237192869186401)


class TestUniforms:
    def test_key_and_position_matter_and_nothing_else(self):
        keys_b = row_keys(0, 0, np.array([4, 9, 4]), np.array([0, 0, 0]))
        at_5_b2, at_6_b2 = uniforms(keys_b, 5), uniforms(keys_b, 6)
        assert at_5_b2.shape == (3, 2)
        assert at_5_b2[0].tolist() == at_5_b2[2].tolist()
        assert len({*at_5_b2[:2].ravel().tolist(), *at_6_b2[:2].ravel().tolist()}) == 8
        # A run that is resumed on another version of JAX must go on with the same numbers.
        np.testing.assert_allclose(uniforms(row_keys(3, 7, [4], [1]), 5), [GOLDEN], rtol=1e-6)
        mixed_b2 = uniforms(keys_b, np.array([6, 5, 5]))
        assert mixed_b2.tolist() == [at_6_b2[0].tolist(), *at_5_b2[1:].tolist()]


DRAWS = 20_000
LOGITS_V = np.random.default_rng(1).normal(0, 1.5, 12).astype(np.float32)


def draw(**options):
    """Tokens and log-probabilities of DRAWS independent choices from LOGITS_V."""
    chosen = choose_many(jnp.tile(LOGITS_V, (DRAWS, 1)), **options)
    return [np.asarray(x) for x in chosen]


def choose_many(logits_bv, vocab_size=12, **options):
    uniform_b2 = jax.random.uniform(jax.random.key(0), (len(logits_bv), 2))
    params = SamplingParams(max_length=1, **options)
    return jax.jit(choose, static_argnums=(2, 3))(logits_bv, uniform_b2, params, vocab_size)


def p_value(tokens_b, prob_v):
    """Chi-square test of the tokens' frequencies."""
    support = prob_v > 0
    counts_v = np.bincount(tokens_b, minlength=12)
    return scipy.stats.chisquare(counts_v[support], prob_v[support] * DRAWS).pvalue


class TestChoose:
    @each_truncation
    def test_frequencies_follow_the_exact_distribution(self, options):
        tokens_b = draw(**options)[0]
        prob_v = reference_distribution(LOGITS_V, **options)
        assert set(tokens_b) == set(np.flatnonzero(prob_v))
        assert p_value(tokens_b, prob_v) > 1e-3

    def test_frequencies_betray_a_wrong_temperature(self):
        wrong_v = reference_distribution(LOGITS_V, temperature=1.2)
        assert p_value(draw()[0], wrong_v) < 1e-6

    @pytest.mark.parametrize("top_p", [1e-30, 1e-39, 1e-320])
    def test_the_likeliest_token_is_kept_by_any_top_p(self, top_p):
        tokens_b, _, sampled_log_probs_b = draw(top_p=top_p)
        assert set(tokens_b.tolist()) == {int(np.argmax(LOGITS_V))}
        assert not np.asarray(sampled_log_probs_b).any()

    @each_truncation
    def test_both_log_probs(self, options):
        tokens_b, log_probs_b, sampled_log_probs_b = draw(**options)
        own_v = np.log(reference_distribution(LOGITS_V))
        sampled_v = np.log(np.maximum(reference_distribution(LOGITS_V, **options), 1e-30))
        np.testing.assert_allclose(log_probs_b, own_v[tokens_b], atol=2e-6)
        np.testing.assert_allclose(sampled_log_probs_b, sampled_v[tokens_b], atol=2e-6)

    @pytest.mark.parametrize("options", [{}, {"top_k": 300}, {"temperature": 0.7, "min_p": 0.05}])
    def test_vocabulary_of_many_blocks(self, options):
        """1000 ids in eight blocks of 128, of which the first 700 are tokens."""
        logits_v = np.random.default_rng(3).normal(0, 1.5, 1000).astype(np.float32)
        logits_v[128:256] = -np.inf  # a block without mass
        chosen = choose_many(jnp.tile(logits_v, (DRAWS, 1)), 700, **options)
        tokens_b, log_probs_b, sampled_log_probs_b = (np.asarray(x) for x in chosen)
        prob_v = reference_distribution(logits_v[:700], **options)
        assert prob_v[tokens_b].min() > 0
        for bin_v in (np.arange(700) // 128, np.arange(700) % 128):
            expected_n = np.bincount(bin_v, prob_v) * DRAWS
            counts_n = np.bincount(bin_v[tokens_b], minlength=len(expected_n))
            kept_n = expected_n > 0
            assert scipy.stats.chisquare(counts_n[kept_n], expected_n[kept_n]).pvalue > 1e-3
        own_v = np.log(np.maximum(reference_distribution(logits_v[:700]), 1e-30))
        np.testing.assert_allclose(log_probs_b, own_v[tokens_b], atol=3e-6)
        np.testing.assert_allclose(sampled_log_probs_b, np.log(prob_v[tokens_b]), atol=3e-6)

    def test_the_only_possible_token_is_certain(self):
        for only in (0, 127, 128, 699):
            logits_bv = jnp.full((50, 700), -jnp.inf).at[:, only].set(3.0)
            tokens_b, *log_probs = choose_many(logits_bv, 700)
            assert set(tokens_b.tolist()) == {only}
            assert all((x_b == 0).all() for x_b in log_probs)

    @each_truncation
    def test_support_is_that_of_transformers(self, options):
        torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
        from transformers.generation import logits_process as warpers

        rows_rv = np.random.default_rng(2).normal(0, 1.5, (5, 12)).astype(np.float32)
        tokens_b = choose_many(jnp.tile(rows_rv, (DRAWS // 5, 1)), **options)[0]
        scores = torch.from_numpy(rows_rv)
        for name, warper in (
            ("temperature", warpers.TemperatureLogitsWarper),
            ("top_k", warpers.TopKLogitsWarper),
            ("top_p", warpers.TopPLogitsWarper),
            ("min_p", warpers.MinPLogitsWarper),
        ):
            scores = warper(options[name])(None, scores) if name in options else scores
        prob_rv = torch.softmax(scores, -1).numpy()
        for row in range(5):
            drawn = set(np.asarray(tokens_b[row::5]))
            assert drawn <= set(np.flatnonzero(prob_rv[row]))
            assert drawn >= set(np.flatnonzero(prob_rv[row] > 5e-3))

    def test_tiny_top_p_and_full_min_p_keep_the_likeliest(self):
        for options in ({"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1}):
            assert set(draw(**options)[0]) == {int(LOGITS_V.argmax())}

    def test_top_p_splits_ties_into_the_smallest_set(self):
        tokens_b, _, sampled_b = choose_many(jnp.zeros((500, 8)), vocab_size=8, top_p=0.5)
        assert set(np.asarray(tokens_b)) == {0, 1, 2, 3}
        np.testing.assert_allclose(sampled_b, np.log(1 / 4), atol=1e-6)

    @pytest.mark.parametrize("options", [{}, TRUNCATIONS["combined"], {"greedy": True}])
    def test_padded_ids_are_never_chosen_and_carry_no_probability(self, options):
        padded_v = np.concatenate([LOGITS_V, [50.0, 60.0]]).astype(np.float32)
        padded = choose_many(jnp.tile(padded_v, (300, 1)), **options)
        exact_v = np.log(reference_distribution(LOGITS_V))
        assert padded[0].max() < 12
        np.testing.assert_allclose(padded[1], exact_v[padded[0]], atol=2e-6)
        assert np.isfinite(padded[2]).all()

    def test_greedy_takes_the_maximum_for_certain(self):
        logits_bv = jnp.array([[0.0, 3.0, 1.0, 9.0], [2.0, -1.0, 0.0, 9.0]])
        tokens_b, log_probs_b, sampled_log_probs_b = choose(
            logits_bv, None, SamplingParams(max_length=1, greedy=True, temperature=5.0), 3
        )
        assert tokens_b.tolist() == [1, 0]
        expected_b = [
            np.log(reference_distribution(np.array(x[:3])))[i]
            for x, i in zip(logits_bv, (1, 0), strict=True)
        ]
        np.testing.assert_allclose(log_probs_b, expected_b, atol=1e-6)
        assert sampled_log_probs_b.tolist() == [0, 0]

    def test_nothing_sorts_the_vocabulary(self):
        def primitives(**options):
            params = SamplingParams(max_length=1, **options)
            program = str(
                jax.make_jaxpr(lambda x, u: choose(x, u, params, 12))(
                    jnp.zeros((2, 12)), jnp.zeros((2, 2))
                )
            )
            return "sort[" in program, "top_k[" in program

        assert primitives() == primitives(temperature=2.0, min_p=0.1) == (False, False)
        assert primitives(top_k=3) == (False, False)
        assert primitives(top_p=0.9) == (False, False)
