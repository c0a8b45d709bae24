"""The router of a mixture of experts, and experts on a mesh; models_test.py has torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from tiny_models import model_config, random_model

from benchmarks.objectives import objective_of
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.data.sequences import Sequences
from distill.models import expert_exchange, lora, moe
from distill.models.facts import Experts, ModelConfig
from distill.step import TeacherInStep, TrainState, describe_load, make_loss, make_train_step

VOCAB, LENGTH, TOLERANCE = 32, 24, 1e-4
FIELDS = dict(
    model_type="qwen3_moe",
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    norm_topk_prob=True,
    mlp_only_layers=[1],
)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, shape)


def test_an_expert_without_tokens_has_no_effect_and_no_gradient():
    config = model_config("llama", experts=Experts(8, 2, 12), num_layers=1)
    graph, params = random_model(config, std=0.4)
    flat = dict(nnx.to_flat_state(params))
    # Scores are relative: a router of nothing but a tie between its first two is never another's.
    router = np.zeros(flat["layers", "router"].get_value().shape, np.float32)
    flat["layers", "router"] = flat["layers", "router"].replace(jnp.asarray(router))
    params = nnx.from_flat_state(flat)
    tokens, counted_bt = random_tokens(2, LENGTH), np.arange(LENGTH) < np.array([[5], [0]])

    def loss(params):
        model = nnx.merge(graph, params)
        hidden_btd, loads = model.with_load(tokens, counted_bt=counted_bt)
        return jnp.square(model.logits(hidden_btd)).mean(), loads

    gradient, loads = jax.jit(jax.grad(loss, has_aux=True))(params)
    by_expert = np.abs(gradient["layers"]["expert_down_proj"][...][0]).max(axis=(1, 2))
    assert (by_expert[:2] > 0).all() and (by_expert[2:] == 0).all()
    assert loads["full"].picks_e.tolist() == [[5, 5, 0, 0, 0, 0, 0, 0]]


def test_the_load_does_not_depend_on_layout():
    lengths = 3, 9, 5, 7
    graph, params = random_model(model_config("llama", experts=Experts(8, 2, 12), num_layers=1))
    sequences = Sequences.of_tokens([random_tokens(x, seed=x) for x in lengths], weight=1)
    loss = jax.jit(make_loss(graph, None, objective_of("forward", hard_labels=True), vocab_size=9))

    def load(layout):
        (batch,) = make_batch(sequences, layout=layout, pad_id=0)
        rows = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.lengths_b))]
        return sum(loss(params, None, each, 1.0)[1]["expert_load"]["full"] for each in rows)

    load_le = load(Layout((Shape(4, 9),)))
    assert load_le.sum() == 2 * sum(lengths)
    np.testing.assert_array_equal(load_le, load(Layout((Shape(1, 12),), packed=True)))
    shares = jax.tree.map(float, describe_load({"full": load_le, "sliding": 3 * load_le}))
    expected = {
        "expert_share_max": float(load_le.max()) / (2 * sum(lengths)),
        "experts_idle": 1 / 8,
    }
    assert shares == pytest.approx(expected) and np.count_nonzero(load_le) == 7


def test_the_routers_loss_does_not_depend_on_microbatches():
    """Nor on padding; and without it, the update is another one."""
    config = model_config("llama", experts=Experts(8, 2, 12), num_layers=1)
    graph, params = random_model(config)
    lengths, optimizer = (3, 9, 5, 7), optax.sgd(1.0)
    sequences = Sequences.of_tokens([random_tokens(x, seed=x) for x in lengths], weight=1)

    def update(weight, layout):
        objective = objective_of("forward", hard_labels=True)
        options = dict(vocab_size=9, router_aux_loss=weight)
        step = make_train_step(graph, [TeacherInStep()], objective, optimizer, **options)
        held = jax.tree.map(jnp.copy, params)
        state = TrainState(jnp.zeros((), jnp.int32), held, optimizer.init(held))
        state, metrics = step(state, [None], make_batch(sequences, layout=layout, pad_id=0))
        return state.params["layers"]["router"][...], metrics

    (whole, metrics), (parts, _) = (
        update(1.0, Layout((Shape(x, y),))) for x, y in ((4, 9), (2, 16))
    )
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    none, others = update(0.0, Layout((Shape(4, 9),)))
    assert np.abs(none - whole).max() > 1e-3 and "router_aux_loss" not in others
    more = metrics["loss"] - others["loss"]
    np.testing.assert_allclose(more, metrics["router_aux_loss"], rtol=1e-4)
    assert metrics["router_aux_loss"] >= 1.9  # 2 where all are even


@pytest.mark.parametrize("logit", [-120.0, -60.0, -46.0])
def test_scores_that_underflow_are_normalized_with_a_finite_gradient(logit):
    experts = Experts(3, 2, 1, scores="sigmoid", normalized=True)

    def first(router):
        return moe.pick(jnp.ones((1, 1)), {"router": router}, experts)[0][0, 0]

    weight, gradient = jax.value_and_grad(first)(jnp.full((1, 3), logit))
    score = np.exp(logit) if logit > -80 else 0.0  # exp(-80) is about float32's smallest
    np.testing.assert_allclose(weight, score / (2 * score + 1e-20), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_the_correction_picks_and_does_not_weigh():
    experts = Experts(4, 2, 12, scores="sigmoid", correction=True, normalized=True, scale=3.0)
    weights = {"router": jnp.eye(4), "router_correction": jnp.array([0.0, 0.0, 9.0, 0.0])}
    scores_tc, picked_tc, _ = moe.pick(jnp.array([[2.0, 1.0, -1.0, 0.0]]), weights, experts)
    assert picked_tc.tolist() == [[2, 0]]
    sigmoids = 1 / (1 + np.exp([1.0, -2.0]))
    np.testing.assert_allclose(scores_tc[0], 3 * sigmoids / sigmoids.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "9 experts of 8 for each token: the fields num_experts_per_t"),
        ({"num_experts": None}, "3 experts of 0 for each token"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ({"mlp_only_layers": 1}, "mlp_only_layers=1 a list of numbers of layers"),
        ({"n_group": 4}, "n_group=4 is not supported, only 1"),
    ],
)
def test_what_is_not_understood_is_refused(change, message):
    assert ModelConfig.from_hf(FIELDS, "here").mixtures == (True, False)
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(FIELDS | change, "here")


EXPERTS = Experts(8, 3, 12, bias=True, shared_width=8, shared_gate=True)


@pytest.fixture(scope="module")
def layer():
    """Of one layer of experts with biases: its parameters, and a loss of them with the load.

    Routing is unbalanced: an expert is picked by all tokens, another by none. Every second row's is
    that of a sampler.
    """
    config = model_config("llama", experts=EXPERTS, num_layers=1, swiglu_limit=1.0)
    graph, params = random_model(config, std=0.4)
    flat = dict(nnx.to_flat_state(params))
    bias = flat["layers", "router_bias"]
    flat["layers", "router_bias"] = bias.replace(bias[...].at[0, 5].set(6).at[0, 6].set(-9))
    x_btd = np.random.default_rng(0).normal(size=(8, 6, config.model_width))
    replayed_btc = np.where(np.arange(8)[:, None, None] % 2, np.array([[[7, 5, 2]]]), -1)
    replayed_btc = np.broadcast_to(replayed_btc, (8, 6, 3)).astype(np.int16)

    def loss(params):
        graphs, stacks = nnx.merge(graph, params).split_layers()
        layer = nnx.merge(graphs["full"], jax.tree.map(lambda x: x[0], stacks["full"]))
        # And of fewer rows than devices, as a sampler has them in the end.
        (y_btd, routing), (y_1td, _) = (
            moe.output(layer, jnp.asarray(x, jnp.float32), replayed)
            for x, replayed in ((x_btd, replayed_btc), (x_btd[:1], None))
        )
        load_e = moe.load(routing, jnp.ones(x_btd.shape[:2], bool)).picks_e
        return jnp.square(y_btd).mean() + jnp.square(y_1td).mean(), load_e

    return nnx.from_flat_state(flat), loss


@pytest.fixture(scope="module")
def expected(layer):
    """Value with the load, and gradient, on one device."""
    params, loss = layer
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    load_e = expected[0][1]
    assert load_e[5] == 48 and load_e[6] == 0 and min(load_e[7], load_e[2]) >= 24
    return expected


def assert_close(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE * float(np.abs(y).max()))


@pytest.mark.parametrize(
    ("sizes", "share", "smallest_round"),
    [
        (dict(data=2, fsdp=2, tensor=2), None, None),
        (dict(data=2, tensor=2, expert=2), 0.0, None),
        (dict(fsdp=2, expert=4), 0.0, 5),  # gathered, in several rounds
        (dict(tensor=2, expert=4), 1.0, 5),  # routed
        (dict(expert=8), 1.0, None),
    ],
)
def test_sharded_gradients_equal_those_of_one_device(
    layer, expected, sizes, share, smallest_round, monkeypatch
):
    """Of a layer's experts with biases; families_test.py has whole models."""
    params, loss = layer
    monkeypatch.setattr(expert_exchange, "LARGEST_SHARE", share)
    if smallest_round:
        monkeypatch.setattr(moe, "SMALLEST_ROUND", smallest_round)
        monkeypatch.setattr(moe, "ROOM", 0.5)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, param_shardings(params, mesh))
        assert_close(jax.jit(jax.value_and_grad(loss, has_aux=True))(sharded), expected)


def test_adapters_of_experts_in_8_bits_have_the_gradients_of_one_device(layer):
    params, loss = layer
    flat, random = dict(nnx.to_flat_state(params)), np.random.default_rng(1)
    adapters = []
    for name, inputs in {"expert_gate_up_proj": 3, "expert_down_proj": 2}.items():
        param = flat["layers", name]
        value, (*leading, width, outputs) = param.get_value(), param.get_value().shape
        axes = [axis for axis in range(value.ndim) if axis != inputs]
        quantized = qwix.quantize(value, jnp.int8, channelwise_axes=axes)
        flat["layers", name] = param.replace(quantized)
        for factor, shape in {"a": (width, 2), "b": (2, outputs)}.items():
            made = jnp.asarray(random.normal(0, 0.3, (*leading, *shape)), jnp.float32)
            adapters.append((("layers", name, factor), nnx.Param(made, scale=0.5)))
    frozen, adapters = nnx.from_flat_state(list(flat.items())), nnx.from_flat_state(adapters)

    def loss_of(adapters):
        return loss(lora.attach(frozen, adapters))

    gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    expected = gradient(adapters)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected[1]))
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        assert_close(gradient(adapters), expected)
