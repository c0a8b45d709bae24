import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.objectives import objective_of
from distill.base.errors import UserError
from distill.build.optimizer import with_schedule
from distill.kernels.linear_divergence import Head, linear_divergence
from distill.losses import divergences, weights
from distill.losses.divergences import (
    Clipped,
    Proximal,
    get_divergence,
    get_loss,
    is_pointwise,
    register_divergence,
    register_loss,
    register_term,
)
from distill.losses.interpolation import Target, interpolated
from distill.losses.weights import register_weight, token_weights

# (name, parameter) with the parameter of the divergence that has one.
CASES = [
    ("forward", None),
    ("reverse", None),
    ("mixed", 0.3),
    ("jsd", 0.0),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 1.0),
    ("skew_forward", 0.0),
    ("skew_forward", 0.1),
    ("skew_reverse", 0.0),
    ("skew_reverse", 0.1),
]
KEYS = {"mixed": "mixed_kl_weight", "jsd": "jsd_beta"}


def divergence_of(name, parameter):
    if callable(name):
        return name
    options = {} if parameter is None else {KEYS.get(name, "skew_alpha"): parameter}
    return get_divergence(name, **options)


def log_softmax64(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl64(log_a, log_b):
    return (np.exp(log_a) * (log_a - log_b)).sum(-1, keepdims=True)


def expected(name, parameter, logits_s, logits_t):
    """Value and gradient by the student's logits in float64, each gradient derived by hand."""
    log_q, log_p = log_softmax64(np.float64(logits_s)), log_softmax64(np.float64(logits_t))
    p, q = np.exp(log_p), np.exp(log_q)
    forward = kl64(log_p, log_q), q - p
    reverse = kl64(log_q, log_p), q * (log_q - log_p - kl64(log_q, log_p))
    if name == "forward" or (name, parameter) in [("jsd", 0.0), ("skew_forward", 0.0)]:
        return forward
    if name == "reverse" or (name, parameter) in [("jsd", 1.0), ("skew_reverse", 0.0)]:
        return reverse
    if name == "mixed":
        return tuple(
            parameter * f + (1 - parameter) * r for f, r in zip(forward, reverse, strict=True)
        )
    if name == "jsd":
        log_m = np.logaddexp(np.log(parameter) + log_p, np.log(1 - parameter) + log_q)
        kl_q = kl64(log_q, log_m)
        value = parameter * kl64(log_p, log_m) + (1 - parameter) * kl_q
        return value, (1 - parameter) * q * (log_q - log_m - kl_q)
    if name == "skew_forward":
        log_m = np.logaddexp(np.log(parameter) + log_p, np.log(1 - parameter) + log_q)
        slope = -p * (1 - parameter) * np.exp(log_q - log_m)
        return kl64(log_p, log_m), slope - q * slope.sum(-1, keepdims=True)
    assert name == "skew_reverse"
    log_m = np.logaddexp(np.log(1 - parameter) + log_p, np.log(parameter) + log_q)
    slope = q * (log_q - log_m + 1 - parameter * np.exp(log_q - log_m))
    return kl64(log_q, log_m), slope - q * slope.sum(-1, keepdims=True)


def random_logits(seed, scale=3.0, shape=(5, 40)):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def evaluate(name, parameter, logits_s, logits_t):
    """Values per token and gradients by the student's logits: heads that change nothing."""
    num_tokens, vocab_size = logits_s.shape
    identity = np.eye(vocab_size, dtype=np.float32)

    def loss(logits_s):
        return linear_divergence(
            *(logits_s, identity, logits_t, identity, np.ones(num_tokens, np.float32)),
            divergence=divergence_of(name, parameter),
            vocab_size=vocab_size,
        )

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(logits_s))
    return np.asarray(values.divergence), np.asarray(gradients)


@pytest.mark.parametrize("name, parameter", CASES)
class TestEveryDivergence:
    def test_value_and_gradient_are_the_float64_formula(self, name, parameter):
        logits_s, logits_t = random_logits(0), random_logits(1)
        values, gradients = evaluate(name, parameter, logits_s, logits_t)
        expected_values, expected_gradients = expected(name, parameter, logits_s, logits_t)
        np.testing.assert_allclose(values, expected_values[:, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradients, expected_gradients, rtol=1e-4, atol=2e-6)

    def test_is_zero_with_zero_gradient_for_equal_models(self, name, parameter):
        logits = random_logits(2)
        values, gradients = evaluate(name, parameter, logits, logits)
        np.testing.assert_allclose(values, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradients, 0.0, atol=1e-6)

    def test_ignores_a_shift_of_the_logits(self, name, parameter):
        logits_s, logits_t = random_logits(3), random_logits(4)
        shifted = evaluate(name, parameter, logits_s + 20.0, logits_t - 30.0)
        still = evaluate(name, parameter, logits_s, logits_t)
        for moved, unmoved in zip(shifted, still, strict=True):
            np.testing.assert_allclose(moved, unmoved, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("seed", [5, 6])
    def test_extreme_logits(self, name, parameter, seed):
        logits_t = np.full((5, 40), -80.0, np.float32)
        logits_t[np.arange(5), [0, 3, 7, 7, 39]] = 80.0  # one-hot teacher
        logits_s = np.clip(random_logits(seed, scale=60.0), -80.0, 80.0)
        logits_s[4] = logits_t[3]  # a student as sure of another token
        for first, second in [(logits_s, logits_t), (logits_t, logits_s)]:
            values, gradients = evaluate(name, parameter, first, second)
            expected_values, expected_gradients = expected(name, parameter, first, second)
            np.testing.assert_allclose(values, expected_values[:, 0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(gradients, expected_gradients, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("log_p", [-1e30, -math.inf])
    def test_impossible_for_both_is_free(self, name, parameter, log_p):
        f = divergence_of(name, parameter)
        value, slope = jax.value_and_grad(f, argnums=1)(jnp.float32(log_p), jnp.float32(-1e30))
        assert (value, slope) == (0.0, 0.0)

    def test_is_a_static_argument(self, name, parameter):
        assert divergence_of(name, parameter) == divergence_of(name, parameter)
        assert hash(divergence_of(name, parameter)) == hash(divergence_of(name, parameter))


@pytest.mark.parametrize("log_p", [-200.0, -1e30, -math.inf])
@pytest.mark.parametrize("name", ["forward", "skew_forward"])
def test_impossible_for_the_teacher_costs_nothing(name, log_p):
    value, slope = jax.value_and_grad(get_divergence(name), argnums=1)(log_p, -1.0)
    assert (value, slope) == (0.0, 0.0)


def test_parameters_are_not_mixed_up():
    assert divergence_of("jsd", 0.2) != divergence_of("jsd", 0.3)
    assert divergence_of("skew_forward", 0.2) != divergence_of("skew_reverse", 0.2)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    for known in (divergences._LOSSES, weights._WEIGHTS):
        monkeypatch.setattr(known, "_parts", dict(known._parts))


class TestRegistry:
    def test_unknown_name_lists_the_known(self):
        with pytest.raises(UserError, match=r"'forwards'.*forward, jsd, mixed, reverse, skew_"):
            get_divergence("forwards")

    @pytest.mark.parametrize("key", ["mixed_kl_weight", "jsd_beta", "skew_alpha"])
    @pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
    def test_parameter_out_of_range(self, key, value):
        with pytest.raises(UserError, match=key):
            get_divergence("forward", **{key: value})

    def test_registered_divergence_is_found(self, registry):
        @register_divergence("total_variation")
        def total_variation(log_p, log_q):
            return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))

        assert get_divergence("total_variation") is total_variation
        assert is_pointwise("total_variation")

    def test_one_namespace_for_divergences_and_losses(self, registry):
        @register_loss("mine")
        def mine(log_p_cv, log_q_cv, targets_c):
            return -log_q_cv[:, 0]

        assert get_loss("mine") is mine
        assert not is_pointwise("mine")
        with pytest.raises(UserError, match="already taken"):
            register_divergence("mine")(lambda log_p, log_q: log_p)
        with pytest.raises(UserError, match="already taken"):
            register_loss("jsd")(lambda log_p_cv, log_q_cv, targets_c: targets_c)
        with pytest.raises(UserError, match="'mine'"):
            get_divergence("mine")

    def test_a_notebook_cell_may_run_twice(self, registry):
        for _ in range(2):

            @register_divergence("again")
            def again(log_p, log_q):
                return log_p - log_q

        assert get_divergence("again") is again


def objective_inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    arrays = normal(4, 6, 3), normal(3, 11), normal(4, 6, 5), normal(5, 12)
    targets_br = jnp.asarray(rng.integers(0, 10, (4, 6)))
    mask_br = jnp.arange(6) < jnp.array([6, 1, 3, 0])[:, None]
    return arrays, targets_br, mask_br


def objective_gradient(objective, arrays, targets_br, weights_br, **columns):
    """By the student's hidden states and head."""

    def loss(hidden_s, head_s):
        arguments = hidden_s, head_s, *arrays[2:], targets_br, weights_br
        return objective(*arguments, vocab_size=10, columns=columns)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays[:2])


class TestTermsAndWeights:
    def test_terms_add_up(self, registry):
        @register_term("unlikely")
        def unlikely(log_p, log_q, is_target):
            return jnp.where(is_target, jnp.exp(log_q - log_p), 0.0)

        arrays, targets_br, mask_br = objective_inputs()
        batch = arrays, targets_br, token_weights(mask_br, 10)
        advantage = jnp.sin(jnp.arange(24.0)).reshape(4, 6)
        terms = "reverse:0.3", "policy_gradient:-2", "cross_entropy:0.1", "unlikely"
        whole = objective_gradient(objective_of("jsd", terms=terms), *batch, advantage=advantage)
        # Every one alone: beside a divergence, less that divergence.
        alone = objective_gradient(objective_of("forward"), *batch)
        parts = [objective_gradient(objective_of("jsd"), *batch)]
        for term in terms:
            objective = objective_of("forward", terms=(term,))
            both = objective_gradient(objective, *batch, advantage=advantage)
            parts.append(jax.tree.map(jnp.subtract, both, alone))
        for total, *each in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
            np.testing.assert_allclose(total, sum(each), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        "implementation, options",
        [
            ("reference", dict(terms=("policy_gradient", "forward:-1"))),
            ("chunked", dict(terms=("policy_gradient", "forward:-1"))),
            ("chunked", dict(divergence=0.0, teacher_advantage=1.0)),
        ],
        ids=["reference", "chunked", "of the teacher"],
    )
    def test_expected_policy_gradient_is_that_of_what_it_is_the_advantage_of(
        self, implementation, options
    ):
        """Every token of the vocabulary as often as the student samples it, by its log p - log q:
        the gradient of KL(q||p)."""
        logits_s, logits_t = random_logits(0, shape=(1, 10)), random_logits(1, shape=(1, 10))
        log_q, log_p = log_softmax64(logits_s), log_softmax64(logits_t)
        eye, targets_br = jnp.eye(10), jnp.arange(10)[None]
        objective = objective_of("forward", loss_implementation=implementation or "auto", **options)

        def loss(logits_s):
            hidden = (jnp.broadcast_to(x, (1, 10, 10)) for x in (logits_s, logits_t))
            hidden_s, hidden_t = hidden
            arguments = hidden_s, eye, hidden_t, eye, targets_br, jnp.float32(np.exp(log_q))
            columns = {"advantage": jnp.float32(log_p - log_q), "sampled": jnp.ones((1, 10), bool)}
            return objective(*arguments, vocab_size=10, columns=columns)[0]

        _, gradient = expected("reverse", None, logits_s, logits_t)
        found = jax.jit(jax.grad(loss))(jnp.asarray(logits_s))
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=2e-6)

    def test_weights_multiply_and_carry_no_gradient(self, registry):
        @register_weight("certain", teacher_entropy=True)
        def certain(statistics, columns):
            return jnp.exp(-statistics.teacher_entropy) * columns["trust"]

        arrays, targets_br, mask_br = objective_inputs()
        trust = jnp.cos(jnp.arange(24.0)).reshape(4, 6)
        log_p = log_softmax64(np.einsum("btd,dv->btv", *arrays[2:])[..., :10].astype(np.float64))
        factor = np.exp((np.exp(log_p) * log_p).sum(-1)) * trust
        weights_br = token_weights(mask_br, 10)
        ours = objective_gradient(
            objective_of("jsd", weights=("certain",)), arrays, targets_br, weights_br, trust=trust
        )
        plain = objective_gradient(objective_of("jsd"), arrays, targets_br, factor * weights_br)
        for ours_x, plain_x in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
            np.testing.assert_allclose(ours_x, plain_x, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("clip", [0.05, 50.0])
    @pytest.mark.parametrize("name", ["forward", "jsd"])
    def test_clip_of_entries(self, name, clip):
        """min(f, clip) of every entry, in float64: what is clipped has no slope."""
        logits_s, logits_t = random_logits(0), random_logits(1)
        log_q, log_p = log_softmax64(np.float64(logits_s)), log_softmax64(np.float64(logits_t))
        p, q = np.exp(log_p), np.exp(log_q)
        log_m = np.logaddexp(np.log(0.5) + log_p, np.log(0.5) + log_q)
        f = p * (log_p - log_q)
        slope = -p
        if name == "jsd":
            slope = 0.5 * q * (log_q - log_m)  # the rest of the derivative adds up to nothing
            f = 0.5 * p * (log_p - log_m) + slope
        slope = np.where(f < clip, slope, 0)
        values, gradients = evaluate(Clipped(get_divergence(name), clip), None, logits_s, logits_t)
        np.testing.assert_allclose(values, np.minimum(f, clip).sum(-1), rtol=1e-5, atol=1e-6)
        expected = slope - q * slope.sum(-1, keepdims=True)
        np.testing.assert_allclose(gradients, expected, rtol=1e-4, atol=2e-6)
        assert (f > clip).any() == (clip < 1)

    @pytest.mark.parametrize("name", ["reverse", "jsd"])
    def test_target_that_holds_the_student(self, name):
        """TOP-D in float64: from 0.3 p + 0.7 q, whose q is a constant."""
        logits_s, logits_t = random_logits(0), random_logits(1)
        log_q, log_p = log_softmax64(np.float64(logits_s)), log_softmax64(np.float64(logits_t))
        log_m = np.log(0.3 * np.exp(log_p) + 0.7 * np.exp(log_q))
        expected_values, expected_gradients = expected(name, 0.5, logits_s, log_m)
        values, gradients = evaluate(Proximal(get_divergence(name), 0.3), None, logits_s, logits_t)
        np.testing.assert_allclose(values, expected_values[:, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradients, expected_gradients, rtol=1e-4, atol=2e-6)
        assert (values < -np.log(0.7)).all()
        objective = objective_of(name, proximal_share=0.3, divergence_clip=9.0)
        assert objective.divergence == Clipped(Proximal(get_divergence(name), 0.3), 9.0)

    def test_reference_of_negative_weight_extrapolates(self):
        """ExOPD in float64: 1.25 KL(q||p) - 0.25 KL(q||r) has the gradient of one target's KL."""
        logits_s, *logits_t = (random_logits(seed) for seed in range(3))
        log_p, log_r = (log_softmax64(np.float64(each)) for each in logits_t)
        _, gradient = expected("reverse", None, logits_s, 1.25 * log_p - 0.25 * log_r)
        objective, head = objective_of("reverse"), jnp.eye(logits_s.shape[1])

        def loss(logits_s):
            shape = 1, len(logits_s)
            return sum(
                objective(
                    *(logits_s[None], head, each[None], head, jnp.zeros(shape, int)),
                    jnp.full(shape, weight),
                    vocab_size=len(head),
                )[0]
                for weight, each in zip((1.25, -0.25), logits_t, strict=True)
            )

        found = jax.jit(jax.grad(loss))(jnp.asarray(logits_s))
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=5e-6)

    @pytest.mark.parametrize("implementation", ["reference", "chunked"])
    def test_forward_is_added_where_the_teacher_is_unsure(self, implementation):
        arrays, targets_br, mask_br = objective_inputs()
        log_q, log_p = (
            log_softmax64(np.einsum("btd,dv->btv", *pair)[..., :10].astype(np.float64))
            for pair in (arrays[:2], arrays[2:])
        )
        entropy = -(np.exp(log_p) * log_p).sum(-1)
        threshold = float(np.median(entropy))
        token_losses = kl64(log_q, log_p)[..., 0]
        token_losses += np.where(entropy > threshold, kl64(log_p, log_q)[..., 0], 0)
        objective = objective_of(
            "reverse", entropy_threshold=threshold, loss_implementation=implementation or "auto"
        )
        weights_br = token_weights(mask_br, mask_br.sum())
        loss, _ = objective(*arrays, targets_br, weights_br, vocab_size=10, columns={})
        assert loss == pytest.approx(token_losses[mask_br].mean(), rel=1e-5)

    def test_two_kinds_of_responses_have_two_divergences(self):
        arrays, targets_br, mask_br = objective_inputs()
        weights_br, sampled = token_weights(mask_br, 10), np.arange(24).reshape(4, 6) % 2 == 0
        pair = objective_of("skew_reverse", kl_type_on_data="skew_forward")
        whole = objective_gradient(pair, arrays, targets_br, weights_br, sampled=sampled)
        parts = [
            objective_gradient(objective_of(name), arrays, targets_br, weights_br * mine)
            for name, mine in (("skew_reverse", sampled), ("skew_forward", ~sampled))
        ]
        for total, *each in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
            np.testing.assert_allclose(total, sum(each), rtol=1e-4, atol=1e-6)

    def test_target_between_student_and_teacher(self):
        """TAID in float64: the KL of softmax((1 - t) s + t u) from q; its gradient is q less it."""
        logits_s, logits_t = random_logits(0, shape=(5, 12)), random_logits(1, shape=(5, 12))
        objective = objective_of("forward", target_start=0.4, max_steps=10)
        share = objective.target.share(jnp.array(5), None)
        assert float(share) == pytest.approx(0.7)
        assert float(objective.target.share(jnp.array(99), None)) == 1
        assert objective_of("forward").target.share(jnp.array(5), None) is None
        mixed = 0.3 * np.float64(logits_s) + 0.7 * np.float64(logits_t)
        log_p, log_q = log_softmax64(mixed), log_softmax64(np.float64(logits_s))
        head = Head(jnp.eye(12))

        def loss(logits_s):
            pair = interpolated(logits_s[None], head, logits_t[None], head, share, 12)
            target, head_t = jax.lax.stop_gradient(pair)
            ones = jnp.ones((1, 5))
            arguments = logits_s[None], head, target, head_t, jnp.zeros((1, 5), int), ones
            return objective(*arguments, vocab_size=12)[0]

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits_s))
        assert value == pytest.approx(kl64(log_p, log_q).sum(), rel=1e-5)
        np.testing.assert_allclose(gradient, np.exp(log_q) - np.exp(log_p), rtol=1e-4, atol=2e-6)
        with pytest.raises(UserError, match="soft cap: set it to 1"):
            interpolated(logits_s, Head(jnp.eye(12), 30.0), logits_t, head, share, 12)

    def test_target_moves_faster_while_the_loss_falls(self):
        """TAID's algorithm 1, step by step in float64."""
        target, steps = Target(0.4, 50, pace=0.1), 30
        optimizer = with_schedule(optax.sgd(0.1), target)
        losses = np.abs(np.random.default_rng(0).standard_normal(steps)) + 2 / np.arange(1, 31)
        params = {"w": jnp.ones(3)}
        state, share, momentum = optimizer.init(params), 0.4, 0.0
        update = jax.jit(optimizer.update)
        for i, loss in enumerate(losses):
            assert float(target.share(jnp.array(i), state)) == pytest.approx(share, abs=1e-6)
            updates, state = update(params, state, params, value=jnp.float32(loss))
            if i:
                change = (losses[i - 1] - loss) / losses[i - 1]
                momentum = 0.99 * momentum + 0.01 * change
                share += 0.1 / (1 + np.exp(-momentum)) * (1 - share)
            share = min(max(share, 0.4 + 0.6 * (i + 1) / 50), 1.0)
        assert share > 0.4 + 0.6 * steps / 50 + 0.05  # ahead of the linear schedule
        np.testing.assert_allclose(updates["w"], -0.1)  # the optimizer's own
        plain = optax.sgd(0.1)
        assert with_schedule(plain, Target(0.4, 50)) is plain is with_schedule(plain, Target())

    def test_alone_is_the_divergence(self):
        objective = objective_of("jsd", terms=("cross_entropy",), importance_clip=2.0)
        assert objective != objective_of("jsd") == objective.alone

    def test_a_column_that_is_missing_is_named(self):
        arrays, targets_br, mask_br = objective_inputs()
        batch = arrays, targets_br, token_weights(mask_br, 10)
        with pytest.raises(UserError, match="weight advantage .* column 'advantage'.* has trust"):
            objective = objective_of("forward", terms=("policy_gradient",))
            objective_gradient(objective, *batch, trust=jnp.ones((4, 6)))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (dict(terms=("crossentropy",)), "objective.terms names 'crossentropy'.*cross_entropy,"),
            (dict(terms=("reverse:x",)), "objective.terms=reverse:x: 'x' is not a finite number"),
            (dict(terms=("reverse",), hard_labels=True), "terms=reverse reads the teacher's"),
            (dict(terms=("pair",), top_k_teacher=True), "terms=pair reads the teacher's"),
            (dict(terms=("row",)), "'row', but the known names are cross_entropy, forward"),
            (
                dict(kl_type="cross_entropy"),
                "kl_type names 'cross_entropy', but the known names are forward",
            ),
            (dict(kl_type="row", terms=("reverse",)), "terms=reverse cannot be added to .*row"),
            (dict(kl_type="row", divergence_clip=1.0), "kl_type=row is a loss of whole rows"),
            (dict(kl_type_on_data="row"), "kl_type_on_data=row is a loss of whole rows"),
            (dict(kl_type_on_data="jsb"), "kl_type_on_data names 'jsb', but the known"),
            (dict(entropy_threshold=1.0, top_k_teacher=True), "entropy_threshold and target_start"),
            (dict(target_start=0.5, divergence=0.0, cross_entropy=1.0), "target_start are about"),
            (dict(terms=("pair",), other_ids=True), "terms=pair reads .*teacher.alignment=none"),
            (dict(target_start=0.5, other_ids=True), "target_start are about .*alignment=none"),
            (dict(kl_type="row", other_ids=True), "kl_type=row is .*, which compares id by id"),
            (
                dict(loss_implementation="pallas", other_ids=True),
                "nor a top-k teacher or one with an",
            ),
            (
                dict(weights=("sure",), top_k_teacher=True),
                "names 'sure', which asks for the .*local",
            ),
            (
                dict(weights=("surer",)),
                "objective.weights names 'surer', but the known names are advantage, sure",
            ),
        ],
    )
    def test_what_does_not_go_together(self, registry, options, words):
        register_term("pair")(lambda log_p, log_q, is_target: log_p * log_q)
        register_weight("sure", teacher_entropy=True)(lambda statistics, columns: columns["weight"])
        register_loss("row")(lambda log_p_cv, log_q_cv, targets_c: log_q_cv[:, 0])
        with pytest.raises(UserError, match=words) as error:
            objective_of(**dict(kl_type="forward") | options)
        assert "\n" not in str(error.value)

    def test_what_goes_together(self):
        objective_of(
            "forward", terms=("cross_entropy",), top_k_teacher=True, weights=("advantage",)
        )
        objective_of("forward", terms=("policy_gradient",), hard_labels=True)


class TestObjective:
    def test_is_the_mean_over_the_valid_tokens(self):
        arrays, targets_br, mask_br = objective_inputs()
        objective = objective_of("reverse")
        loss, values = objective(*arrays, targets_br, token_weights(mask_br, 10), vocab_size=10)
        assert values.divergence.shape == values.log_prob_s.shape == (4, 6)
        np.testing.assert_allclose(loss, values.divergence[mask_br].mean(), rtol=1e-6)

    def test_value_and_gradient_do_not_depend_on_microbatches(self):
        (hidden_s, head_s, hidden_t, head_t), targets_br, mask_br = objective_inputs()
        objective = objective_of("jsd")
        weights_br = token_weights(mask_br, mask_br.sum())

        def loss(head_s, rows):
            return objective(
                hidden_s[rows],
                head_s,
                hidden_t[rows],
                head_t,
                targets_br[rows],
                weights_br[rows],
                vocab_size=10,
            )[0]

        value_and_grad = jax.jit(jax.value_and_grad(loss))
        whole = value_and_grad(head_s, jnp.arange(4))
        parts = [value_and_grad(head_s, rows) for rows in (jnp.arange(1), jnp.arange(1, 4))]
        for first, second, total in zip(*parts, whole, strict=True):
            np.testing.assert_allclose(first + second, total, rtol=1e-5, atol=1e-7)

    def test_temperature_squared_scales_the_loss(self):
        arrays, targets_br, mask_br = objective_inputs()
        plain, squared = (
            objective_of("forward", kl_temperature=3.0, kl_temperature_squared=flag)(
                *arrays, targets_br, token_weights(mask_br, 10), vocab_size=10
            )[0]
            for flag in (False, True)
        )
        np.testing.assert_allclose(squared, 9.0 * plain, rtol=1e-6)

    def test_hard_labels_need_no_teacher(self):
        (hidden_s, head_s, _, _), targets_br, mask_br = objective_inputs()
        objective = objective_of("forward", hard_labels=True, kl_temperature=3.0)
        assert not objective.needs_teacher
        weights_br = token_weights(mask_br, 10)
        loss, values = objective(
            hidden_s, head_s, None, None, targets_br, weights_br, vocab_size=10
        )
        np.testing.assert_allclose(loss, -values.log_prob_s[mask_br].mean(), rtol=1e-6)

    def test_kl_type_may_name_a_registered_loss(self, registry):
        @register_loss("teacher_weighted")
        def teacher_weighted(log_p_cv, log_q_cv, targets_c):
            rows_c = jnp.arange(targets_c.size)
            return -jnp.exp(log_p_cv[rows_c, targets_c]) * log_q_cv[rows_c, targets_c]

        arrays, targets_br, mask_br = objective_inputs()
        objective = objective_of("teacher_weighted")
        loss, values = objective(*arrays, targets_br, token_weights(mask_br, 10), vocab_size=10)
        losses_br = -jnp.exp(values.log_prob_t) * values.log_prob_s
        np.testing.assert_allclose(loss, losses_br[mask_br].mean(), rtol=1e-6)

    def test_no_valid_token_is_zero_not_nan(self):
        assert token_weights(jnp.zeros((2, 3), bool), 0).tolist() == [[0.0] * 3] * 2

    def test_equal_configurations_compile_once(self):
        assert objective_of("jsd", jsd_beta=0.3) == objective_of("jsd", jsd_beta=0.3)
        assert hash(objective_of("jsd")) == hash(objective_of("jsd"))
        assert objective_of("jsd", jsd_beta=0.3) != objective_of("jsd")

    def test_bad_arguments(self):
        with pytest.raises(UserError, match="kl_temperature=0"):
            objective_of("forward", kl_temperature=0.0)
        with pytest.raises(
            UserError, match="kl_type names 'kl', but the known names are .*reverse"
        ):
            objective_of("kl")
        with pytest.raises(UserError, match="'mosaic'.*reference, chunked"):
            objective_of("forward", loss_implementation="mosaic")
