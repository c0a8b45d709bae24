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

from distill.kernels.linear_divergence import (
    linear_cross_entropy,
    linear_divergence,
    linear_loss,
    per_token_divergences,
)
from distill.kernels.linear_divergence.sweeps import XlaSweeps
from distill.losses.divergences import get_divergence
from distill.sharding import make_mesh, named_sharding

IMPLEMENTATIONS = ["reference", "chunked"]
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


def terms_and_slopes64(name, p, q):
    """f and df/dlog_q of each divergence, float64."""
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
    return 0.5 * (np.sqrt(p) - np.sqrt(q)) ** 2, -0.5 * (np.sqrt(p) - np.sqrt(q)) * np.sqrt(q)


@dataclasses.dataclass(frozen=True)
class Problem:
    hidden_s: np.ndarray
    head_s: np.ndarray
    hidden_t: np.ndarray
    head_t: np.ndarray
    weights: np.ndarray
    targets: np.ndarray
    vocab_size: int

    @property
    def arrays(self):
        return self.hidden_s, self.head_s, self.hidden_t, self.head_t, self.weights

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


def expected64(problem, name, temperature):
    """Per-token divergence, dz, dh_s and dW_s in float64 from the rounded inputs."""
    hidden_s, head_s, hidden_t, head_t, weights = (x.astype(np.float64) for x in problem.arrays)
    head_s, head_t = head_s[:, : problem.vocab_size], head_t[:, : problem.vocab_size]

    p, q = softmax64(hidden_t @ head_t / temperature), softmax64(hidden_s @ head_s / temperature)
    terms, slopes = terms_and_slopes64(name, p, q)
    dz = weights[:, None] * (slopes - q * slopes.sum(-1, keepdims=True)) / temperature
    return terms.sum(-1), dz, dz @ head_s.T, hidden_s.T @ dz


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


def all_divergences(problem, names, **options):
    """{name: ((loss, values), gradients)} in one compilation."""

    def evaluate(hidden_s, head_s):
        def loss(hidden_s, head_s, name):
            rows = hidden_s, head_s, *problem.arrays[2:]
            options_of = dict(divergence=DIVERGENCES[name], **problem.targeted, **options)
            return linear_divergence(*rows, **options_of)

        value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return {name: value_and_grad(hidden_s, head_s, name) for name in names}

    return compiled(evaluate)(problem.hidden_s, problem.head_s)


# Tokens, chunk, vocabulary, dtype, divergences: all divergences at one size per dtype, and every
# size with at least one, dealt out because compiling them all would take minutes.
SIZES = [
    (7, 3, 33, "float32", tuple(DIVERGENCES)),
    (7, 3, 512, "bfloat16", tuple(DIVERGENCES)),
    (1, None, 33, "bfloat16", ("forward",)),
    (1, None, 512, "float32", ("skew_reverse",)),
    (1, None, 1187, "float32", ("user",)),
    (7, 3, 1187, "float32", ("mixed",)),
    (128, 48, 33, "bfloat16", ("reverse",)),
    (128, 48, 512, "float32", ("skew_forward",)),
    (128, 48, 1187, "float32", ("reverse",)),
    (128, 48, 1187, "bfloat16", ("jsd",)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementations:
    @pytest.mark.parametrize("num_tokens, chunk, vocab_size, dtype, names", SIZES)
    def test_values_and_gradients(
        self, implementation, num_tokens, chunk, vocab_size, dtype, names
    ):
        problem = make_problem(num_tokens, vocab_size, dtype)
        options = dict(temperature=TEMPERATURE, implementation=implementation, chunk=chunk)
        for name, ((loss, values), gradients) in all_divergences(problem, names, **options).items():
            expected_t = expected64(problem, name, TEMPERATURE)[0]
            # Logits of either dtype are float32 sums, so values are float32 accurate in both.
            assert_close(values.divergence, expected_t, "float32", 1.0, vocab_size)
            expected_loss = np.sum(np.asarray(problem.weights, np.float64) * expected_t)
            assert_close(loss, expected_loss, "float32", 1.0, vocab_size)
            assert_gradients_close(gradients, problem, name, dtype)

    def test_target_log_probs_are_at_temperature_one(self, implementation):
        problem = make_problem(7, 33)
        (_, values), _ = all_divergences(
            problem, ("reverse",), temperature=3.0, implementation=implementation
        )["reverse"]
        models = problem.arrays[:2], problem.arrays[2:4]
        for actual, (hidden, head) in zip(
            (values.log_prob_s, values.log_prob_t), models, strict=True
        ):
            probabilities = softmax64((hidden @ head[:, :33]).astype(np.float64))
            expected = np.log(probabilities[np.arange(7), problem.targets])
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

    def test_without_targets_log_probs_are_zero(self, implementation):
        problem = make_problem(3, 33)
        options = dict(divergence=DIVERGENCES["jsd"], implementation=implementation)
        fused = compiled(lambda *arrays: linear_divergence(*arrays, vocab_size=33, **options))
        _, values = jax.device_get(fused(*problem.arrays))
        assert not values.log_prob_s.any() and not values.log_prob_t.any()
        assert values.divergence.all()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_cross_entropy_is_that_of_optax(self, implementation, dtype):
        problem = make_problem(7, 512, dtype)

        def fused(hidden_s, head_s):
            rows = hidden_s, head_s, problem.targets, problem.weights
            options = dict(vocab_size=512, implementation=implementation, chunk=3)
            return linear_cross_entropy(*rows, **options)

        def plain(hidden_s, head_s):
            logits = jnp.dot(hidden_s, head_s[:, :512], preferred_element_type=jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, problem.targets)
            return jnp.sum(problem.weights * losses), losses

        (loss, values), gradients = gradients_of(fused, problem)
        (expected_loss, expected_t), expected_gradients = gradients_of(plain, problem)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
        np.testing.assert_allclose(values.divergence, expected_t, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values.log_prob_s, -expected_t, rtol=1e-5, atol=1e-5)
        assert not values.log_prob_t.any()
        for actual, expected in zip(gradients, expected_gradients, strict=True):
            expected = np.asarray(expected).astype(np.float64)
            assert_close(actual, expected, dtype, np.abs(expected).max(), 1)

    def test_custom_loss_is_its_autodiff(self, implementation):
        problem = make_problem(7, 33)

        def focal_toward_the_teacher(log_p_cv, log_q_cv, targets_c):
            best_c = jnp.argmax(log_p_cv, axis=-1)
            log_best_c = jnp.take_along_axis(log_q_cv, best_c[:, None], axis=-1)[:, 0]
            log_target_c = jnp.take_along_axis(log_q_cv, targets_c[:, None], axis=-1)[:, 0]
            return -((1 - jnp.exp(log_best_c)) ** 2) * log_target_c

        def fused(hidden_s, head_s):
            options = dict(loss_fn=focal_toward_the_teacher, temperature=TEMPERATURE, chunk=3)
            rows = hidden_s, head_s, *problem.arrays[2:]
            return linear_loss(*rows, implementation=implementation, **options, **problem.targeted)

        def plain(hidden_s, head_s):
            log_q = jax.nn.log_softmax(hidden_s @ head_s[:, :33] / TEMPERATURE)
            log_p = jax.nn.log_softmax(problem.hidden_t @ problem.head_t[:, :33] / TEMPERATURE)
            losses = focal_toward_the_teacher(log_p, log_q, problem.targets)
            return jnp.sum(problem.weights * losses), losses

        (loss, values), gradients = gradients_of(fused, problem)
        (expected_loss, expected_t), expected_gradients = gradients_of(plain, problem)
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
            rows = hidden_s, head_s, problem.targets[::-1], problem.weights
            options = dict(vocab_size=33, implementation=implementation, chunk=3)
            return linear_cross_entropy(*rows, **options)[0]

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

    def test_a_head_smaller_than_the_vocabulary_is_refused(self, implementation):
        problem = make_problem(3, 33)
        with pytest.raises(ValueError, match="vocab_size=39 exceeds the 38 columns of head_s"):
            linear_divergence(
                *problem.arrays,
                divergence=DIVERGENCES["jsd"],
                vocab_size=39,
                implementation=implementation,
            )


def test_an_implementation_that_cannot_run_is_refused():
    problem = make_problem(3, 33)
    with pytest.raises(ValueError, match="'pallas' cannot run on cpu.*'chunked'"):
        linear_cross_entropy(
            *problem.arrays[:2],
            problem.targets,
            problem.weights,
            vocab_size=33,
            implementation="pallas",
        )


def test_a_custom_loss_of_the_wrong_shape_is_refused():
    problem = make_problem(3, 33)
    with pytest.raises(ValueError, match=r"one number per token, shape \(3,\).*returned \(3, 33\)"):
        linear_loss(
            *problem.arrays, loss_fn=lambda log_p, log_q, targets: log_p * log_q, **problem.targeted
        )


@pytest.mark.parametrize("chunk", [None, 3])
def test_per_token_divergences(chunk):
    problem = make_problem(7, 33)
    options = dict(divergences=tuple(DIVERGENCES.values()), temperature=TEMPERATURE, chunk=chunk)
    evaluate = compiled(lambda *arrays: per_token_divergences(*arrays, vocab_size=33, **options))
    values_nt = evaluate(*problem.arrays[:4])
    expected_nt = [expected64(problem, name, TEMPERATURE)[0] for name in DIVERGENCES]
    np.testing.assert_allclose(values_nt, expected_nt, rtol=1e-5, atol=1e-6)


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
        sweeps = XlaSweeps(budget_bytes=20 * 96 * XlaSweeps.bytes_per_logit)  # twenty tokens
        scans = [
            equation.params["length"]
            for equation in equations(self.traced(self.loss(sweeps, None)))
            if equation.primitive.name == "scan"
        ]
        assert scans == [13]

    def test_gradients_are_made_forward_and_only_when_asked_for(self):
        def num_products(function):
            primitives = [equation.primitive.name for equation in equations(self.traced(function))]
            return primitives.count("dot_general")

        # Two heads; then the gradients of hidden states and head. No second pass over a head.
        assert num_products(self.loss("chunked")) == 2
        assert num_products(self.gradient("chunked")) == 4


def largest_collective(hlo):
    """Elements of the largest result of a collective operation in the text of a program."""
    results = re.findall(r" = (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all)\(", hlo)
    shapes = re.findall(r"[fb]f?\d+\[([\d,]+)\]", " ".join(results))
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


class TestSharded:
    """Tokens over data and fsdp, vocabulary over tensor, 2 x 2 x 2 devices."""

    def shardings(self, mesh, num_tokens):
        tokens = named_sharding(mesh, "token" if num_tokens % 4 == 0 else None, None)
        head = named_sharding(mesh, "embed", "vocab")
        return tokens, head, tokens, head

    def run(self, problem, chunk):
        def evaluate(hidden_s, head_s, hidden_t, head_t):
            def loss(hidden_s, head_s):
                rows = hidden_s, head_s, hidden_t, head_t, problem.weights
                options = dict(divergence=DIVERGENCES["jsd"], temperature=TEMPERATURE, chunk=chunk)
                return linear_divergence(*rows, **options, **problem.targeted)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden_s, head_s)

        return compiled(evaluate)

    @pytest.mark.parametrize("num_tokens, vocab_size, chunk", [(64, 33, 16), (50, 33, 8)])
    def test_equals_unsharded(self, num_tokens, vocab_size, chunk):
        problem = make_problem(num_tokens, vocab_size, padding_s=7, padding_t=11)
        plain = self.run(problem, chunk)(*problem.arrays[:4])
        mesh = make_mesh(2, 2, 2)
        with jax.set_mesh(mesh):
            arrays = [
                jax.device_put(x, sharding)
                for x, sharding in zip(
                    problem.arrays[:4], self.shardings(mesh, num_tokens), strict=True
                )
            ]
            sharded = self.run(problem, chunk)(*arrays)
        for actual, expected in zip(*map(jax.tree.leaves, (sharded, plain)), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6)

    def test_heads_and_their_gradient_cross_devices_once_not_per_chunk(self):
        problem = make_problem(64, 256, padding_s=0, padding_t=0)
        mesh = make_mesh(2, 2, 2)
        with jax.set_mesh(mesh):
            arrays = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                for x, sharding in zip(problem.arrays[:4], self.shardings(mesh, 64), strict=True)
            ]
            program = self.run(problem, 16).lower(*arrays).compile().as_text()
        loop, entry = program.split("\nENTRY ")
        local_head = problem.head_s.size // 2  # vocabulary over two devices
        # In the loop: sums over the vocabulary per token, and the hidden states' gradient.
        assert 0 < largest_collective(loop) <= 16 * problem.hidden_s.shape[1] < local_head
        assert largest_collective(entry) >= local_head
