"""Every implementation of the fused losses against float64 NumPy and automatic differentiation."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from distill.base.mesh import make_mesh
from distill.base.sharding import named_sharding
from distill.kernels.linear_divergence import (
    DivergenceTerm,
    Head,
    RowLoss,
    Term,
    TermSum,
    TopK,
    api,
    cross_entropy,
    linear_divergence,
    linear_loss,
    pallas_tpu,
    per_token_divergences,
    weighted_first,
)
from distill.kernels.linear_divergence.sweeps import XlaSweeps
from distill.losses.divergences import get_divergence

# The kernels for TPU run anywhere in Pallas' interpreter, here on blocks that are smaller than the
# problems; compiled kernels join where the device is.
IMPLEMENTATIONS = {
    "reference": "reference",
    "chunked": "chunked",
    "pallas_tpu": pallas_tpu.Sweeps(
        pallas_tpu.Config(32, 256), pallas_tpu.Config(48, 384), interpret=True, row_multiple=16
    ),
}
if jax.default_backend() != "cpu":
    IMPLEMENTATIONS["pallas"] = "pallas"
TEMPERATURE = 1.7

# Rounding of one term, in units of the largest, by the dtype of hidden states and heads; the error
# of a sum grows with the square root of its length.
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}

# Compiling takes nearly all the time of these tests, and its optimisation is not under test.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def squared_hellinger(log_p, log_q):
    """What a user may register."""
    return 0.5 * (jnp.exp(0.5 * log_p) - jnp.exp(0.5 * log_q)) ** 2


DIVERGENCES = {
    "forward": get_divergence("forward"),
    "reverse": get_divergence("reverse"),
    "mixed": get_divergence("mixed", mixed_kl_weight=0.3),
    "jsd": get_divergence("jsd", jsd_beta=0.2),
    "skew_forward": get_divergence("skew_forward"),
    "skew_reverse": get_divergence("skew_reverse"),
    "user": squared_hellinger,
}


def unlikelihood(log_p, log_q, is_target):
    """A term of a user's own: what both models and the target have a say in."""
    return jnp.where(is_target, 0.0, jnp.exp(log_q) * (2.0 - jnp.exp(log_p)))


def certain(statistics, columns):
    """A weight of a user's own, of everything there is."""
    kls = statistics.forward_kl + 0.5 * statistics.reverse_kl
    log_probs = 0.1 * statistics.log_prob_s - 0.2 * statistics.log_prob_t
    return jnp.exp(-statistics.teacher_entropy) + kls + log_probs


certain.teacher_entropy = True


def advantage(statistics, columns):
    return columns["advantage"]


def loss_of(*terms, weights=()):
    return TermSum(tuple(terms), TEMPERATURE, weights)


TERMS = {name: Term(DivergenceTerm(divergence)) for name, divergence in DIVERGENCES.items()}
TERMS |= {
    "cross_entropy": Term(cross_entropy),
    "policy_gradient": Term(cross_entropy, 1.0, advantage),
    "unlikelihood": Term(unlikelihood),
}
LOSSES = {name: loss_of(term) for name, term in TERMS.items()} | {
    # From the first sweep alone; and with terms that need the second between others.
    "closed": loss_of(*(TERMS[x] for x in ("forward", "policy_gradient", "reverse"))),
    "swept": loss_of(
        TERMS["jsd"],
        Term(cross_entropy, 0.3),
        Term(unlikelihood, -0.7, advantage),
        TERMS["policy_gradient"],
    ),
    "weighted": loss_of(TERMS["user"], Term(cross_entropy, 0.3, advantage), weights=(certain,)),
}
SUMS = "policy_gradient", "unlikelihood", "closed", "swept", "weighted"


def terms_and_slopes64(function, p, q, y):
    """f and df/dlog_q of each term, float64."""
    [name, *_] = [name for name, term in TERMS.items() if term.function == function]
    ratio = np.log(q) - np.log(p)
    if name == "forward":
        return -p * ratio, -p
    if name == "reverse":
        return q * ratio, q * (ratio + 1)
    if name == "mixed":
        return 0.3 * -p * ratio + 0.7 * q * ratio, -0.3 * p + 0.7 * q * (ratio + 1)
    if name == "jsd":
        m = 0.2 * p + 0.8 * q
        return 0.2 * p * np.log(p / m) + 0.8 * q * np.log(q / m), 0.8 * q * np.log(q / m)
    if name == "skew_forward":
        m = 0.1 * p + 0.9 * q
        return p * np.log(p / m), -p * 0.9 * q / m
    if name == "skew_reverse":
        m = 0.9 * p + 0.1 * q
        return q * np.log(q / m), q * (np.log(q / m) + 1 - 0.1 * q / m)
    if name == "cross_entropy":
        return -y * np.log(q), -y
    if name == "unlikelihood":
        return (1 - y) * q * (2 - p), (1 - y) * q * (2 - p)
    return 0.5 * (np.sqrt(p) - np.sqrt(q)) ** 2, -0.5 * (np.sqrt(p) - np.sqrt(q)) * np.sqrt(q)


def factor64(weight, problem, p, q, temperature):
    """A weight of the tokens, float64, from probabilities at the loss temperature."""
    if weight is None:
        return 1.0
    if weight is advantage:
        return problem.columns["advantage"].astype(np.float64)
    log_probs = []
    for x in (q**temperature, p**temperature):
        picked = x[np.arange(len(x)), problem.targets] / x.sum(-1)
        log_probs.append(np.log(picked))
    forward, reverse = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
    certainty = np.exp((p * np.log(p)).sum(-1))
    return certainty + forward + 0.5 * reverse + 0.1 * log_probs[0] - 0.2 * log_probs[1]


@dataclasses.dataclass(frozen=True)
class Problem:
    hidden_s: np.ndarray
    head_s: np.ndarray
    hidden_t: np.ndarray
    head_t: np.ndarray
    weights: np.ndarray
    targets: np.ndarray
    vocab_size: int
    soft_caps: tuple = (None, None)  # student's and teacher's

    @property
    def columns(self):
        advantages = np.random.default_rng(1).standard_normal(len(self.weights))
        return {"advantage": advantages.astype(np.float32)}

    @property
    def arrays(self):
        return self.hidden_s, self.head_s, self.hidden_t, self.head_t, self.weights

    @property
    def models(self):
        """`arrays` with the heads' caps."""
        heads = map(Head, (self.head_s, self.head_t), self.soft_caps)
        return self.hidden_s, next(heads), self.hidden_t, next(heads), self.weights

    def counted(self, values_t):
        """0 for tokens without weight, which are not computed."""
        return np.where(self.weights != 0, values_t, 0)

    @property
    def targeted(self):
        return dict(targets=self.targets, vocab_size=self.vocab_size)


def make_problem(
    num_tokens, vocab_size, dtype="float32", padding_s=5, padding_t=12, widths=(8, 12)
):
    """Student and teacher with their own widths and padded vocabularies; the padding is garbage."""
    rng = np.random.default_rng(num_tokens + vocab_size)
    width_s, width_t = widths

    def normal(*shape, scale=1.0):
        return scale * rng.standard_normal(shape)

    head_s = normal(width_s, vocab_size + padding_s, scale=2 / math.sqrt(width_s))
    head_t = normal(width_t, vocab_size + padding_t, scale=2 / math.sqrt(width_t))
    head_s[:, vocab_size:], head_t[:, vocab_size:] = 1e4, -1e4
    weights = rng.uniform(0.5, 2.0, num_tokens) / num_tokens
    weights[1::4] = 0.0
    models = normal(num_tokens, width_s), head_s, normal(num_tokens, width_t), head_t
    return Problem(
        *(x.astype(jnp.dtype(dtype)) for x in models),
        weights=weights.astype(np.float32),
        targets=rng.integers(0, vocab_size, num_tokens).astype(np.int32),
        vocab_size=vocab_size,
    )


def softmax64(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def capped64(logits, soft_cap):
    """Capped logits, and their derivative."""
    if soft_cap is None:
        return logits, 1.0
    return soft_cap * np.tanh(logits / soft_cap), 1 / np.cosh(logits / soft_cap) ** 2


def expected64(problem, name, temperature):
    """(terms before weighting, counted; loss), dz, dh_s and dW_s, float64, from rounded inputs."""
    hidden_s, head_s, hidden_t, head_t, weights = (x.astype(np.float64) for x in problem.arrays)
    head_s, head_t = head_s[:, : problem.vocab_size], head_t[:, : problem.vocab_size]
    (logits_s, slopes_s), (logits_t, _) = (
        capped64(hidden @ head, soft_cap)
        for hidden, head, soft_cap in zip(
            (hidden_s, hidden_t), (head_s, head_t), problem.soft_caps, strict=True
        )
    )
    p, q = softmax64(logits_t / temperature), softmax64(logits_s / temperature)
    y = np.eye(problem.vocab_size)[problem.targets]
    values, loss, dz = [], 0.0, 0.0
    for weight in LOSSES[name].weights:
        weights = weights * factor64(weight, problem, p, q, temperature)
    for term in LOSSES[name].terms:
        factor = term.coefficient * factor64(term.weight, problem, p, q, temperature)
        terms, slopes = terms_and_slopes64(term.function, p, q, y)
        values.append(problem.counted(terms.sum(-1)))
        loss += (weights * factor * values[-1]).sum()
        slopes = slopes - q * slopes.sum(-1, keepdims=True)
        dz += (weights * factor)[:, None] * slopes / temperature
    dz = dz * slopes_s
    return (values, loss), dz, dz @ head_s.T, hidden_s.T @ dz


def assert_close(actual, expected, dtype, scale, length):
    """`scale` bounds one term of a sum of `length` terms."""
    actual = np.asarray(actual).astype(np.float64)
    tolerance = TOLERANCE[dtype] * scale * math.sqrt(length)
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype], atol=tolerance)


def assert_gradients_close(gradients, problem, name, dtype, temperature=TEMPERATURE):
    dhidden, dhead = gradients
    _, dz, expected_dhidden, expected_dhead = expected64(problem, name, temperature)
    num_tokens, vocab_size = dz.shape
    assert dhidden.dtype == problem.hidden_s.dtype and dhead.dtype == problem.head_s.dtype
    dhead = np.asarray(dhead)
    head_scale = np.abs(problem.head_s[:, :vocab_size]).max()
    hidden_scale = np.abs(problem.hidden_s).max()
    dz_scale = np.abs(dz).max()
    assert_close(dhidden, expected_dhidden, dtype, dz_scale * head_scale, vocab_size)
    assert_close(dhead[:, :vocab_size], expected_dhead, dtype, dz_scale * hidden_scale, num_tokens)
    assert not dhead[:, vocab_size:].any()


def gradients_of(loss_fn, problem):
    """((loss, values), (dhidden_s, dhead_s)) of loss_fn(hidden_s, head_s)."""
    value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    return compiled(value_and_grad)(problem.hidden_s, problem.head_s)


def all_losses(problem, names, temperature=TEMPERATURE, **options):
    """{name: ((loss, values), gradients)} in one compilation."""
    options |= problem.targeted

    # All arrays are arguments: products of constants would be computed by the compiler, slowly.
    def evaluate(models, columns):
        def loss(hidden_s, head_s, name):
            loss = dataclasses.replace(LOSSES[name], temperature=temperature)
            return linear_loss(loss, hidden_s, head_s, *models[2:], columns=columns, **options)

        value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        results = {name: value_and_grad(*models[:2], name) for name in names}
        return {
            name: (values, (dhidden, dhead.weights_dv))
            for name, (values, (dhidden, dhead)) in results.items()
        }

    return compiled(evaluate)(problem.models, problem.columns)


def cross_entropy_loss(hidden, head, problem, **options):
    """Without a teacher."""
    rows = hidden, head, None, None, problem.weights
    return linear_loss(TermSum.of(cross_entropy), *rows, **problem.targeted, **options)


# Tokens, chunk, vocabulary, dtype, losses: all divergences at one size per dtype, and every
# size with at least one, dealt out because compiling them all would take minutes.
SIZES = [
    (7, 3, 33, "float32", (*DIVERGENCES, *SUMS)),
    (7, 3, 512, "bfloat16", tuple(DIVERGENCES)),
    (1, None, 33, "bfloat16", ("forward",)),
    (1, None, 512, "float32", ("skew_reverse",)),
    (1, None, 1187, "float32", ("user",)),
    (7, 3, 1187, "float32", ("mixed",)),
    (128, 48, 33, "bfloat16", ("reverse",)),
    (128, 48, 512, "float32", ("skew_forward",)),
    (128, 48, 1187, "float32", ("reverse", "swept")),
    (128, 48, 1187, "bfloat16", ("jsd",)),
    (7, None, 4101, "bfloat16", ("mixed", "closed")),
    (1000, 384, 33, "float32", ("user",)),
    (1000, 384, 4101, "float32", ("forward", "skew_forward")),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


class TestImplementations:
    @pytest.mark.parametrize("num_tokens, chunk, vocab_size, dtype, names", SIZES)
    def test_values_and_gradients(
        self, implementation, num_tokens, chunk, vocab_size, dtype, names
    ):
        problem = make_problem(num_tokens, vocab_size, dtype)
        options = dict(implementation=implementation, chunk=chunk)
        for name, ((loss, values), gradients) in all_losses(problem, names, **options).items():
            expected_nt, expected_loss = expected64(problem, name, TEMPERATURE)[0]
            # Logits of either dtype are float32 sums, so values are float32 accurate in both.
            assert_close(values.terms, expected_nt, "float32", 1.0, vocab_size)
            assert_close(loss, expected_loss, "float32", 1.0, vocab_size)
            assert_gradients_close(gradients, problem, name, dtype)

    @pytest.mark.parametrize(
        "soft_caps, num_tokens, chunk, vocab_size, dtype, names",
        [
            ((3.0, 2.0), 7, 3, 1187, "float32", ("swept",)),
            ((2.5, None), 128, 48, 512, "bfloat16", ("forward",)),
            ((None, 1.5), 1, None, 33, "float32", ("jsd",)),
        ],
    )
    def test_capped_logits(
        self, implementation, soft_caps, num_tokens, chunk, vocab_size, dtype, names
    ):
        """As a model's output would be, before the temperature."""
        problem = make_problem(num_tokens, vocab_size, dtype)
        problem = dataclasses.replace(problem, soft_caps=soft_caps)
        options = dict(implementation=implementation, chunk=chunk)
        for name, ((loss, values), gradients) in all_losses(problem, names, **options).items():
            expected_nt, expected_loss = expected64(problem, name, TEMPERATURE)[0]
            assert_close(values.terms, expected_nt, "float32", 1.0, vocab_size)
            assert_close(loss, expected_loss, "float32", 1.0, vocab_size)
            assert_gradients_close(gradients, problem, name, dtype)

    def test_extreme_logits(self, implementation):
        """Logits of up to 80 either way; teachers and students that are certain, and disagree."""
        rng = np.random.default_rng(0)
        num_tokens, vocab_size = 8, 700
        logits_s, logits_t = rng.uniform(-80, 80, (2, num_tokens, vocab_size))
        for token, (row_s, row_t) in enumerate(zip(logits_s[:5], logits_t[:5], strict=True)):
            if token in (0, 1, 2):
                row_t[:], row_t[token] = -80, 80
            if token in (1, 2, 3):
                row_s[:], row_s[max(token, 2)] = -80, 80
        eye = np.eye(num_tokens)
        problem = Problem(
            *(x.astype(np.float32) for x in (eye, logits_s, eye, logits_t)),
            weights=np.ones(num_tokens, np.float32),
            targets=np.arange(num_tokens, dtype=np.int32),
            vocab_size=vocab_size,
        )
        results = all_losses(problem, tuple(DIVERGENCES), 1.0, implementation=implementation)
        for name, ((_, values), gradients) in results.items():
            (expected_nt, _), _, expected_dhidden, expected_dhead = expected64(problem, name, 1.0)
            np.testing.assert_allclose(values.terms, expected_nt, rtol=1e-4, atol=2e-5)
            np.testing.assert_allclose(gradients[1], expected_dhead, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(gradients[0], expected_dhidden, rtol=1e-3, atol=2e-2)

    def test_a_student_with_much_more_padding(self, implementation):
        """So much that its logits have a block of columns more than the teacher's."""
        problem = make_problem(32, 300, padding_s=700, padding_t=8)
        options = dict(implementation=implementation, chunk=16)
        _, gradients = all_losses(problem, ("jsd",), **options)["jsd"]
        assert_gradients_close(gradients, problem, "jsd", "float32")

    def test_tokens_without_weight_have_no_influence(self, implementation):
        """Not even where their slope is infinite, as of this divergence between equal models."""
        problem = make_problem(7, 33)
        weights = np.where(np.arange(7) % 2, 0, problem.weights)
        hidden = np.where(np.arange(7)[:, None] % 2, 0, problem.hidden_s)  # equal: all logits 0
        teacher = np.where(np.arange(7)[:, None] % 2, 0, problem.hidden_t)

        def loss(hidden_s, head_s):
            rows = hidden_s, head_s, teacher, problem.head_t, weights
            options = dict(implementation=implementation, chunk=3, **problem.targeted)
            root = lambda log_p, log_q: jnp.exp(log_p) * jnp.abs(log_p - log_q) ** 0.5  # noqa: E731
            return linear_divergence(*rows, divergence=root, **options)

        if implementation == "reference":
            pytest.skip("automatic differentiation multiplies 0 by infinity")
        _, gradients = gradients_of(loss, dataclasses.replace(problem, hidden_s=hidden))
        assert all(np.isfinite(gradient).all() for gradient in gradients)
        assert not gradients[0][1::2].any() and gradients[0][::2].any()

    def test_a_target_outside_of_the_vocabulary_is_none(self, implementation):
        problem = make_problem(3, 33)
        problem = dataclasses.replace(problem, targets=np.array([35, -1, 40], np.int32))
        (_, values), _ = all_losses(problem, ("jsd",), implementation=implementation)["jsd"]
        assert not values.log_prob_s.any() and not values.log_prob_t.any()

    def test_target_log_probs_are_at_temperature_one(self, implementation):
        problem = make_problem(7, 33)
        (_, values), _ = all_losses(problem, ("reverse",), 3.0, implementation=implementation)[
            "reverse"
        ]
        models = problem.arrays[:2], problem.arrays[2:4]
        for actual, (hidden, head) in zip(
            (values.log_prob_s, values.log_prob_t), models, strict=True
        ):
            probabilities = softmax64((hidden @ head[:, :33]).astype(np.float64))
            expected = problem.counted(np.log(probabilities[np.arange(7), problem.targets]))
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

    def test_without_targets_log_probs_are_zero(self, implementation):
        problem = make_problem(3, 33)
        options = dict(divergence=DIVERGENCES["jsd"], implementation=implementation)
        fused = compiled(lambda *arrays: linear_divergence(*arrays, vocab_size=33, **options))
        _, values = jax.device_get(fused(*problem.arrays))
        assert not values.log_prob_s.any() and not values.log_prob_t.any()
        assert ((values.divergence != 0) == (problem.weights != 0)).all()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_cross_entropy_is_that_of_optax(self, implementation, dtype):
        problem = make_problem(7, 512, dtype)

        def fused(hidden_s, head_s):
            return cross_entropy_loss(
                hidden_s, head_s, problem, implementation=implementation, chunk=3
            )

        def plain(hidden_s, head_s):
            logits = jnp.dot(hidden_s, head_s[:, :512], preferred_element_type=jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, problem.targets)
            return jnp.sum(problem.weights * losses), losses

        (loss, values), gradients = gradients_of(fused, problem)
        (expected_loss, expected_t), expected_gradients = gradients_of(plain, problem)
        expected_t = problem.counted(expected_t)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        np.testing.assert_allclose(values.divergence, expected_t, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values.log_prob_s, -expected_t, rtol=1e-5, atol=1e-5)
        assert not values.log_prob_t.any()
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            expected = np.asarray(expected).astype(np.float64)
            assert_close(actual, expected, dtype, np.abs(expected).max(), 1)

    @pytest.mark.parametrize("soft_caps", [(None, None), (3.0, 2.0)])
    def test_custom_loss_is_its_autodiff(self, implementation, soft_caps):
        problem = dataclasses.replace(make_problem(7, 33), soft_caps=soft_caps)

        def focal_toward_the_teacher(log_p_cv, log_q_cv, targets_c):
            best_c = jnp.argmax(log_p_cv, axis=-1)
            log_best_c = jnp.take_along_axis(log_q_cv, best_c[:, None], axis=-1)[:, 0]
            log_target_c = jnp.take_along_axis(log_q_cv, targets_c[:, None], axis=-1)[:, 0]
            return -((1 - jnp.exp(log_best_c)) ** 2) * log_target_c

        def fused(hidden_s, head_s):
            loss = RowLoss(focal_toward_the_teacher, TEMPERATURE)
            rows = hidden_s, Head(head_s, soft_caps[0]), *problem.models[2:]
            options = dict(implementation=implementation, chunk=3, **problem.targeted)
            return linear_loss(loss, *rows, **options)

        def plain(hidden_s, head_s):
            logits_s, logits_t = (
                hidden_s @ head_s[:, :33],
                problem.hidden_t @ problem.head_t[:, :33],
            )
            logits_s, logits_t = (
                x if cap is None else cap * jnp.tanh(x / cap)
                for x, cap in zip((logits_s, logits_t), soft_caps, strict=True)
            )
            log_q = jax.nn.log_softmax(logits_s / TEMPERATURE)
            log_p = jax.nn.log_softmax(logits_t / TEMPERATURE)
            losses = focal_toward_the_teacher(log_p, log_q, problem.targets)
            return jnp.sum(problem.weights * losses), losses

        (loss, values), gradients = gradients_of(fused, problem)
        (expected_loss, expected_t), expected_gradients = gradients_of(plain, problem)
        expected_t = problem.counted(expected_t)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        np.testing.assert_allclose(values.divergence, expected_t, rtol=1e-5, atol=1e-6)
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)

    def test_tied_head_gets_the_gradient_of_both_uses(self, implementation):
        problem = make_problem(7, 33)

        def embed_and(loss_of_head):
            def loss(embedding_vd):
                return loss_of_head(embedding_vd[problem.targets], embedding_vd.T)

            return compiled(jax.grad(loss))(problem.head_s.T)

        def fused(hidden_s, head_s):
            turned = dataclasses.replace(problem, targets=problem.targets[::-1])
            options = dict(implementation=implementation, chunk=3)
            return cross_entropy_loss(hidden_s, head_s, turned, **options)[0]

        def plain(hidden_s, head_s):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                hidden_s @ head_s[:, :33], problem.targets[::-1]
            )
            return jnp.sum(problem.weights * losses)

        np.testing.assert_allclose(embed_and(fused), embed_and(plain), rtol=1e-4, atol=1e-6)

    def test_only_the_student_gets_gradients_and_only_from_the_loss(self, implementation):
        problem = make_problem(7, 33)

        def loss(loss_weight, value_weight, *arrays):
            options = dict(implementation=implementation, chunk=3, **problem.targeted)
            loss, values = linear_divergence(*arrays, divergence=DIVERGENCES["jsd"], **options)
            return loss_weight * loss + value_weight * sum(map(jnp.sum, jax.tree.leaves(values)))

        gradients = compiled(jax.grad(loss, argnums=(2, 3, 4, 5, 6)))
        once = jax.device_get(gradients(1.0, 0.0, *problem.arrays))
        assert [bool(gradient.any()) for gradient in once] == [True, True, False, False, False]
        for single, triple in zip(once, gradients(3.0, 5.0, *problem.arrays), strict=True):
            np.testing.assert_allclose(triple, 3.0 * single, rtol=1e-4, atol=1e-7)

    def test_per_token_divergences(self, implementation):
        problem = make_problem(7, 33)
        options = dict(temperature=TEMPERATURE, implementation=implementation, chunk=3)
        options |= dict(divergences=tuple(DIVERGENCES.values()), vocab_size=33)
        for weights in (problem.weights, np.ones(7, np.float32)):
            weighted = dataclasses.replace(problem, weights=weights)
            given = None if weights.all() else weights
            values_nt = compiled(
                lambda *arrays, given=given: per_token_divergences(
                    *arrays, weights=given, **options
                )
            )(*problem.arrays[:4])
            expected_nt = [expected64(weighted, name, TEMPERATURE)[0][0][0] for name in DIVERGENCES]
            np.testing.assert_allclose(values_nt, expected_nt, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [("x",), ("data", "model")])
def test_a_mesh_of_other_axes_is_refused(axes):
    mesh = jax.make_mesh((1,) * len(axes), axes, devices=jax.devices()[:1])
    problem = make_problem(3, 33)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=rf"{axes[0]}.* and lacks .*make_mesh"):
        all_losses(problem, ("jsd",), implementation="chunked")


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(vocab_size=39), "vocab_size=39 exceeds the 38 columns of head_s"),
        (dict(head_t=np.zeros((12, 20))), "vocab_size=33 exceeds the 20 columns of head_t"),
        (dict(hidden_s=np.zeros((3, 9))), r"hidden_s \(3, 9\) and head_s \(8, 38\)"),
        (dict(hidden_t=np.zeros((4, 12))), r"hidden_t \(4, 12\) is not of 3 tokens"),
        (dict(weights=np.zeros(4)), r"weights \(4,\) must be \(3,\)"),
        (dict(targets=np.zeros((3, 1))), r"targets \(3, 1\) must be \(3,\)"),
        (dict(hidden_s=np.zeros(8)), r"hidden_s \(8,\) and head_s"),
        (dict(hidden_s=np.zeros((0, 8))), r"hidden_s \(0, 8\) has no tokens"),
        (dict(temperature=0.0), "temperature=0.0 is not positive"),
        (dict(chunk=0), "chunk=0 tokens: it must be at least 1"),
        (dict(divergence="forward"), "divergence='forward' is not a hashable function"),
        (dict(divergence=lambda p, q: jnp.sum(p * q, -1)), r"not pointwise: .* made \[\(3,\)\]"),
        (dict(divergence=lambda p, q: p - q.mean()), "not pointwise: it uses reduce_sum"),
        (dict(divergence=lambda p, q: p * q[::-1]), "not pointwise: it uses rev"),
        (
            dict(divergence=lambda p, q: jax.lax.cond(True, lambda: p - q.mean(), lambda: p)),
            "not pointwise: it uses reduce_sum",
        ),
        (dict(implementation="triton"), "'triton' is unknown: .* reference, chunked, pallas"),
        (dict(implementation="pallas"), "'pallas' cannot run on cpu: it needs a TPU"),
    ],
)
def test_bad_arguments_are_refused(changed, message):
    problem = dataclasses.asdict(make_problem(3, 33))
    del problem["soft_caps"]
    with pytest.raises(ValueError, match=message):
        linear_divergence(**problem | dict(divergence=DIVERGENCES["jsd"]) | changed)


@pytest.mark.parametrize(
    "platform, capability, version, expected",
    [
        ("cpu", 0.0, (0, 11, 0), "chunked"),
        ("gpu", 8.9, (0, 11, 0), "chunked"),
        ("gpu", 9.0, (0, 10, 2), "chunked"),
        ("gpu", 9.0, (0, 11, 0), "pallas"),
        ("gpu", 10.0, (0, 11, 0), "chunked"),
    ],
)
def test_kernels_are_the_default_on_gpus_that_have_run_them(
    platform, capability, version, expected, monkeypatch
):
    monkeypatch.setattr(api, "platform", lambda: platform)
    monkeypatch.setattr(api, "cuda_capability", lambda: capability)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert api.resolve_implementation(None) == expected
    assert api.resolve_implementation(None, fused=False) == "chunked"


def test_the_kernels_refuse_what_they_cannot_fuse():
    problem = make_problem(3, 33)
    with pytest.raises(ValueError, match="'pallas' runs neither losses of whole rows nor a top-k"):
        linear_loss(RowLoss(max), *problem.arrays, implementation="pallas", **problem.targeted)


def test_a_custom_loss_of_the_wrong_shape_is_refused():
    problem = make_problem(3, 33)
    with pytest.raises(ValueError, match=r"one number per token, shape \(3,\).*returned \(3, 33\)"):
        loss = RowLoss(lambda log_p, log_q, targets: log_p * log_q)
        linear_loss(loss, *problem.arrays, **problem.targeted)


# A chunk that fills its strips, whose gradient is fused with its products, and one that does not.
@pytest.mark.parametrize("chunk", [16, 20])
def test_kernels_are_free_of_races_and_read_nothing_uninitialised(chunk):
    """In Pallas' simulation of a TPU, whose memory is full of NaN until written."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    sweeps = pallas_tpu.Sweeps(pallas_tpu.Config(16, 256), pallas_tpu.Config(16, 128), interpret)
    # Whole blocks of columns, because the simulation reads past the end of arrays that are written
    # in place.
    problem = make_problem(23, 300, "bfloat16", padding_s=212, padding_t=212)
    names = "forward", "swept", "weighted"
    results = all_losses(problem, names, implementation=sweeps, chunk=chunk)
    expected = all_losses(problem, names, implementation="chunked", chunk=chunk)
    for actual, wanted in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        actual, wanted = (np.asarray(x).astype(np.float32) for x in (actual, wanted))
        np.testing.assert_allclose(actual, wanted, rtol=1e-2, atol=1e-2 * np.abs(wanted).max())
    assert interpret_pallas_call.races is not None  # that is, the detector ran
    assert not interpret_pallas_call.races.races_found


TOP_K = 5


def make_top_k(problem, k=TOP_K, absent=1):
    """The teacher's k likeliest tokens, unordered, the last `absent` columns without one."""
    logits = problem.hidden_t.astype(np.float64) @ problem.head_t[:, : problem.vocab_size]
    log_probs = np.log(softmax64(logits / TEMPERATURE))
    ids = np.argsort(-log_probs, axis=1)[:, :k]
    picked = np.take_along_axis(log_probs, ids, axis=1)
    ids = np.concatenate([ids, np.full((len(ids), absent), -1)], axis=1)
    picked = np.concatenate([picked, np.zeros((len(ids), absent))], axis=1)
    return ids[:, ::-1].astype(np.int32), picked[:, ::-1].astype(np.float32)


def expected_top_k64(problem, name, ids):
    """Divergence and dz over the k tokens and one bucket of all others, in float64."""
    logits_s, logits_t = (
        hidden.astype(np.float64) @ head[:, : problem.vocab_size]
        for hidden, head in zip(problem.arrays[:3:2], problem.arrays[1:4:2], strict=True)
    )
    logits_s, slopes_s = capped64(logits_s, problem.soft_caps[0])
    p, q = softmax64(logits_t / TEMPERATURE), softmax64(logits_s / TEMPERATURE)
    divergences, gradients = [], []
    for p_v, q_v, ids_k in zip(p, q, ids, strict=True):
        ids_k = ids_k[ids_k >= 0]
        bucket_v = np.full(problem.vocab_size, len(ids_k))  # outcome of each token
        bucket_v[ids_k] = np.arange(len(ids_k))
        p_n, q_n = (np.bincount(bucket_v, x_v, len(ids_k) + 1) for x_v in (p_v, q_v))
        terms_n, slopes_n = terms_and_slopes64(TERMS[name].function, p_n, q_n, None)
        divergences.append(terms_n.sum())
        gradients.append(q_v * (slopes_n / q_n)[bucket_v] - q_v * slopes_n.sum())
    dz = problem.weights[:, None] * np.asarray(gradients) / TEMPERATURE * slopes_s
    return problem.counted(np.asarray(divergences)), dz


def top_k_gradients(problem, name, ids, log_probs, **options):
    def loss(hidden_s, head_s):
        head_s = Head(head_s, problem.soft_caps[0])
        rows = hidden_s, head_s, TopK(ids, log_probs), None, problem.weights
        options_of = dict(columns=problem.columns, **options, **problem.targeted)
        return linear_loss(LOSSES[name], *rows, **options_of)

    return gradients_of(loss, problem)


class TestTopKTeacher:
    @pytest.mark.parametrize("implementation", ["reference", "chunked"])
    @pytest.mark.parametrize("name, cap", [*((name, None) for name in DIVERGENCES), ("jsd", 2.0)])
    def test_values_and_gradients(self, implementation, name, cap):
        problem = dataclasses.replace(make_problem(7, 33), soft_caps=(cap, None))
        ids, log_probs = make_top_k(problem)
        (loss, values), (dhidden, dhead) = top_k_gradients(
            problem, name, ids, log_probs, implementation=implementation, chunk=3
        )
        expected_t, dz = expected_top_k64(problem, name, ids)
        np.testing.assert_allclose(values.divergence, expected_t, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(loss, problem.weights @ expected_t, rtol=1e-5)
        head_s = problem.head_s[:, :33]
        np.testing.assert_allclose(dhidden, dz @ head_s.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dhead[:, :33], problem.hidden_s.T @ dz, rtol=1e-4, atol=1e-6)
        assert not dhead[:, 33:].any()

    @pytest.mark.parametrize("implementation", ["reference", "chunked"])
    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_all_tokens_listed_is_the_full_divergence(self, implementation, name):
        problem = make_problem(7, 33)
        ids, log_probs = make_top_k(problem, k=33, absent=0)
        options = dict(implementation=implementation, chunk=3)
        result = top_k_gradients(
            problem, name, ids, log_probs, implementation=implementation, chunk=3
        )
        full = all_losses(problem, (name,), **options)[name]
        for actual, wanted in zip(*map(jax.tree.leaves, (result[1], full[1])), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose(result[0][1].divergence, full[0][1].divergence, atol=2e-6)

    @pytest.mark.parametrize("implementation", ["reference", "chunked"])
    def test_terms_of_the_target_are_over_the_vocabulary(self, implementation):
        problem = make_problem(7, 33)
        ids, log_probs = make_top_k(problem)
        options = dict(implementation=implementation, chunk=3)
        sum_of = top_k_gradients(problem, "closed", ids, log_probs, **options)[1]
        parts = [
            top_k_gradients(problem, name, ids, log_probs, **options)[1]
            for name in ("forward", "reverse")
        ]
        parts.append(all_losses(problem, ("policy_gradient",), **options)["policy_gradient"][1])
        for actual, *wanted in zip(*map(jax.tree.leaves, (sum_of, *parts)), strict=True):
            np.testing.assert_allclose(actual, sum(wanted), rtol=1e-4, atol=1e-6)

    def test_is_never_negative_and_at_most_the_full_divergence(self):
        """Unlike the sum over the listed tokens alone."""
        problem = make_problem(128, 33)
        ids, log_probs = make_top_k(problem, k=3)
        _, values = top_k_gradients(problem, "forward", ids, log_probs)[0]
        full = expected64(problem, "forward", TEMPERATURE)[0][0][0]
        assert (values.divergence >= 0).all() and (values.divergence <= full + 1e-5).all()

    def test_target_log_probs(self):
        problem = make_problem(7, 33)
        ids, log_probs = make_top_k(problem)
        targets = np.where(np.arange(7) % 2, ids[:, 2], np.setdiff1d(np.arange(33), ids)[0])
        problem = dataclasses.replace(problem, targets=targets.astype(np.int32))
        for implementation in ("reference", "chunked"):
            (_, values), _ = top_k_gradients(
                problem, "forward", ids, log_probs, implementation=implementation
            )
            tail = np.log1p(-np.where(ids >= 0, np.exp(log_probs), 0).sum(1))
            expected = problem.counted(np.where(np.arange(7) % 2, log_probs[:, 2], tail))
            np.testing.assert_allclose(values.log_prob_t, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("implementation", ["reference", "chunked"])
    def test_ids_outside_of_the_vocabulary_belong_to_the_bucket(self, implementation):
        problem = make_problem(7, 33)
        ids, log_probs = make_top_k(problem)
        foreign = np.where(np.arange(ids.shape[1]) == 2, 35, ids)
        absent = np.where(np.arange(ids.shape[1]) == 2, -1, ids)
        results = [
            top_k_gradients(problem, "jsd", x, log_probs, implementation=implementation, chunk=3)
            for x in (foreign, absent)
        ]
        for actual, wanted in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(actual, wanted)

    def test_bad_arguments_are_refused(self):
        problem = make_problem(7, 33)
        ids, log_probs = make_top_k(problem)
        with pytest.raises(ValueError, match=r"ids \(7, 6\) and .*\(7, 5\)"):
            top_k_gradients(problem, "forward", ids, log_probs[:, 1:])
        with pytest.raises(ValueError, match=r"ids \(6, 6\) are not of 7 tokens"):
            top_k_gradients(problem, "forward", ids[1:], log_probs[1:])
        with pytest.raises(ValueError, match="'pallas' runs neither .* nor a top-k teacher"):
            top_k_gradients(problem, "forward", ids, log_probs, implementation="pallas")


def equations(jaxpr):
    """Every equation, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def largest_array(jaxpr):
    return max(
        math.prod(variable.aval.shape)
        for equation in equations(jaxpr)
        for variable in equation.outvars
    )


class TestMemoryAndWork:
    problem = make_problem(256, 96)
    logits_size = 256 * 96

    def loss(self, implementation, chunk=32):
        def loss(hidden_s, head_s):
            rows = hidden_s, head_s, *self.problem.arrays[2:]
            options = dict(implementation=implementation, chunk=chunk, **self.problem.targeted)
            return linear_divergence(*rows, divergence=DIVERGENCES["jsd"], **options)

        return loss

    def traced(self, function):
        return jax.make_jaxpr(function)(self.problem.hidden_s, self.problem.head_s).jaxpr

    def gradient(self, implementation, chunk=32):
        return jax.value_and_grad(self.loss(implementation, chunk), argnums=(0, 1), has_aux=True)

    def test_never_all_logits(self):
        assert largest_array(self.traced(self.gradient("reference"))) == self.logits_size
        assert largest_array(self.traced(self.gradient("chunked"))) < self.logits_size
        assert largest_array(self.traced(self.loss("chunked"))) < self.logits_size

    def test_compiled_memory_is_a_fraction_of_all_logits(self):
        arguments = self.problem.hidden_s, self.problem.head_s
        executable = jax.jit(self.gradient("chunked", 8)).lower(*arguments).compile()
        assert executable.memory_analysis().temp_size_in_bytes < 4 * self.logits_size

    def test_default_chunk_fits_the_budget(self):
        columns = self.problem.head_s.shape[1]
        sweeps = XlaSweeps(budget_bytes=20 * columns * XlaSweeps.bytes_per_logit)  # twenty tokens
        rows = [
            equation.outvars[0].aval.shape[0]
            for equation in equations(self.traced(self.loss(sweeps, None)))
            if equation.primitive.name == "dot_general"
        ]
        assert rows == [20, 20]  # of 256 tokens in thirteen even chunks, student and teacher

    def test_chunks_without_weight_are_not_computed(self):
        """Nine tokens of 256 have weight, and come first: in chunks of four, three are entered."""
        entered = []

        def noted(log_p, log_q):
            jax.debug.callback(lambda: entered.append(1))
            return jnp.exp(log_p) * (log_p - log_q)

        weights = jnp.zeros(256).at[::29].set(1)
        weights = weighted_first(weights).apply(weights)
        rows = *self.problem.arrays[:4], weights
        options = dict(vocab_size=self.problem.targeted["vocab_size"], implementation="chunked")
        jax.block_until_ready(
            jax.jit(lambda: linear_divergence(*rows, divergence=noted, chunk=4, **options))()
        )
        jax.effects_barrier()
        assert len(entered) == 3

    def test_gradients_are_made_forward_and_only_when_asked_for(self):
        def num_products(function):
            primitives = [equation.primitive.name for equation in equations(self.traced(function))]
            return primitives.count("dot_general")

        # Two heads; then the gradients of hidden states and head. No second pass over a head.
        assert num_products(self.loss("chunked")) == 2
        assert num_products(self.gradient("chunked")) == 4


def largest_collective(hlo):
    """Elements of the largest result of a collective operation in the text of a program."""
    operation = "(?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    results = re.findall(rf" = (.*?) {operation}\(", hlo)
    shapes = re.findall(r"[fb]f?\d+\[([\d,]+)\]", " ".join(results))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


class TestSharded:
    """Tokens over data and fsdp, vocabulary over tensor, 2 x 2 x 2 devices."""

    def shardings(self, mesh, num_tokens):
        tokens = named_sharding(mesh, "token" if num_tokens % 4 == 0 else None, None)
        head = named_sharding(mesh, "embed", "vocab")
        return tokens, head, tokens, head

    def run(self, problem, loss_of, implementation="chunked", chunk=16):
        """Value, values per token and gradients of loss_of(hidden_s, head_s, hidden_t, head_t)."""

        def evaluate(hidden_s, head_s, hidden_t, head_t):
            def value(hidden_s, head_s):
                head_s = Head(head_s, problem.soft_caps[0])
                loss, teacher = loss_of(hidden_t, Head(head_t, problem.soft_caps[1]))
                options = dict(implementation=implementation, chunk=chunk, columns=problem.columns)
                rows = hidden_s, head_s, *teacher, problem.weights
                return linear_loss(loss, *rows, **options, **problem.targeted)

            return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(hidden_s, head_s)

        return compiled(evaluate)

    def assert_equals_unsharded(self, problem, *arguments, **options):
        plain = self.run(problem, *arguments, **options)(*problem.arrays[:4])
        mesh = make_mesh(2, 2, 2)
        shardings = self.shardings(mesh, len(problem.weights))
        with jax.set_mesh(mesh):
            arrays = map(jax.device_put, problem.arrays[:4], shardings)
            sharded = self.run(problem, *arguments, **options)(*arrays)
        for actual, expected in zip(*map(jax.tree.leaves, (sharded, plain)), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6)

    @staticmethod
    def loss_named(name):
        return lambda *teacher: (LOSSES[name], teacher)

    # The kernels with one of each kind: from two sweeps, from three, and a user's.
    @pytest.mark.parametrize(
        "implementation, name",
        [("chunked", name) for name in (*DIVERGENCES, "closed", "swept", "weighted")]
        + [("pallas_tpu", name) for name in ("mixed", "swept", "weighted")],
    )
    def test_every_loss(self, implementation, name):
        # 300 columns over two devices: the second one's end lies within a block.
        problem = make_problem(64, 300, padding_s=8, padding_t=12)
        loss = self.loss_named(name)
        self.assert_equals_unsharded(problem, loss, IMPLEMENTATIONS[implementation])

    @pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
    def test_capped_logits(self, implementation):
        problem = make_problem(64, 300, padding_s=8, padding_t=12)
        problem = dataclasses.replace(problem, soft_caps=(3.0, 2.0))
        loss = self.loss_named("swept")
        self.assert_equals_unsharded(problem, loss, IMPLEMENTATIONS[implementation])

    @pytest.mark.parametrize("num_tokens, vocab_size, chunk", [(50, 33, 8), (3, 33, None)])
    def test_ragged_sizes(self, num_tokens, vocab_size, chunk):
        # The second device holds padding only.
        problem = make_problem(num_tokens, vocab_size, padding_s=7, padding_t=11)
        self.assert_equals_unsharded(problem, self.loss_named("jsd"), chunk=chunk)

    def test_cross_entropy(self):
        problem = make_problem(64, 300, padding_s=8, padding_t=12)
        self.assert_equals_unsharded(problem, lambda *_: (TermSum.of(cross_entropy), (None, None)))

    def test_loss_of_whole_rows(self):
        def chebyshev(log_p_cv, log_q_cv, targets_c):
            return jnp.max(jnp.abs(jnp.exp(log_p_cv) - jnp.exp(log_q_cv)), axis=-1)

        problem, loss = make_problem(64, 300, padding_s=8, padding_t=12), RowLoss(chebyshev)
        self.assert_equals_unsharded(problem, lambda *teacher: (loss, teacher))

    def test_top_k_teacher(self):
        problem = make_problem(64, 300, padding_s=8, padding_t=12)
        top_k = TopK(*make_top_k(problem))
        loss = loss_of(TERMS["jsd"], TERMS["policy_gradient"])
        self.assert_equals_unsharded(problem, lambda *_: (loss, (top_k, None)))

    # With padding, columns change devices too: both heads are cut at the same ones.
    @pytest.mark.parametrize("padding_s, padding_t", [(0, 0), (8, 12)])
    def test_heads_and_their_gradient_cross_devices_once_not_per_chunk(self, padding_s, padding_t):
        problem = make_problem(64, 256, padding_s=padding_s, padding_t=padding_t)
        mesh = make_mesh(2, 2, 2)
        with jax.set_mesh(mesh):
            arrays = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                for x, sharding in zip(problem.arrays[:4], self.shardings(mesh, 64), strict=True)
            ]
            lowered = self.run(problem, self.loss_named("jsd")).lower(*arrays)
        loop, entry = lowered.compile().as_text().split("\nENTRY ")
        local_head = 12 * 256 // 2  # of the larger one; vocabulary over two devices
        # In the loop, sums over the vocabulary of a chunk's 4 tokens per device: maxima of both
        # models, then eight sums; JSD also needs its two.
        assert 0 < largest_collective(loop) <= 8 * 4
        assert largest_collective(entry) == local_head
        assert len(re.findall(r"= \S+ reduce-scatter\(", lowered.as_text(dialect="hlo"))) == 1
