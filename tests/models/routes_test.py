"""Experts that the sampler picked: recorded, compared with the trainer's, and replayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config, random_model

from benchmarks.objectives import objective_of
from distill.batches.packing import Layout, Shape
from distill.batches.rows import make_batch
from distill.data.sequences import Sequences
from distill.models import decoding, moe, routes
from distill.models.facts import Experts
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest
from distill.step import make_loss

NUMBERS = "routed_tokens", "routes_missed"
VOCAB, LENGTHS, GENERATIONS, RESPONSE = 29, (3, 5, 1), 2, 6
EXPERTS = Experts(8, 2, 12, normalized=True)


def test_what_the_router_would_pick_is_replayed_to_the_bit():
    """In whatever order. Other experts are picked, too, with the router's own scores of them."""
    random = np.random.default_rng(0)
    weights = {"router": jnp.asarray(random.normal(size=(6, 8)), jnp.float32)}
    x_td = jnp.asarray(random.normal(size=(5, 6)), jnp.float32)

    @jax.jit
    def picked(weights, replayed_tc=None):
        def loss(weights):
            scores_tc, picked_tc, _ = moe.pick(x_td, weights, EXPERTS, replayed_tc)
            return jnp.sum(scores_tc * jnp.array([1.0, 3.0])), (scores_tc, picked_tc)

        return jax.grad(loss, has_aux=True)(weights)

    gradient, (scores_tc, picked_tc) = picked(weights)
    known_tc = picked_tc[:, ::-1].at[3].set(-1).astype(routes.DTYPE)
    for found, expected in zip(
        jax.tree.leaves(picked(weights, known_tc)),
        jax.tree.leaves((gradient, (scores_tc, picked_tc))),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    other_tc = (picked_tc + 1) % 8
    _, (scores_tc, found_tc) = picked(weights, other_tc)
    np.testing.assert_array_equal(np.sort(found_tc), np.sort(other_tc))
    probs_te = jax.nn.softmax(jnp.matmul(x_td, weights["router"], precision="highest"))
    of_others_tc = jnp.take_along_axis(probs_te, found_tc, axis=1)
    expected_tc = of_others_tc / of_others_tc.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores_tc, expected_tc, rtol=1e-5)


# The second of three layers of experts has a window; the fourth has none.
CONFIG = model_config(
    "qwen3",
    num_layers=4,
    pattern=("full", "sliding"),
    window=4,
    experts=EXPERTS,
    mixtures=(True, True, True, False),
)


def rollouts(graph, params, num_slots: int) -> Sequences:
    random = np.random.default_rng(0)
    prompts = [random.integers(1, VOCAB, size).astype(np.int32) for size in LENGTHS]
    config = EngineConfig(max_length=16, num_slots=num_slots, records_routes=True)
    engine = Engine(graph, config, eos_ids=(3,), pad_id=0, vocab_size=VOCAB)
    request = RolloutRequest(
        tuple(prompts), np.arange(3), SamplingParams(RESPONSE), num_generations=GENERATIONS
    )
    rollout, _ = engine.generate(params, request)
    repeated = [prompt for prompt in prompts for _ in range(GENERATIONS)]
    return rollout.sequences(Sequences.of_tokens(repeated))


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def sampled(model):
    """Responses by weights that are rounded, so that routers differ; and those weights."""
    graph, params = model
    rounded = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype), params)
    return rollouts(graph, rounded, num_slots=4), rounded


def missed_and_known(graph, params, sequences):
    """Picks of all tokens, in packed rows: how many the model misses, and how many are known."""
    (batch,) = make_batch(sequences, layout=Layout((Shape(6, 12),), packed=True), pad_id=0)
    rows = jax.tree.map(lambda x: x[0], batch)
    sampled_btm = rows.columns["routed_experts"]
    arrays = rows.tokens_bt, rows.positions_bt, rows.segment_ids_bt, rows.filled_bt
    load = moe.add_layers(nnx.merge(graph, params).with_load(*arrays, sampled_btm)[1])
    return int(load.missed_bt.sum()), int((sampled_btm >= 0).sum())


def test_all_tokens_but_the_first_have_the_experts_they_were_predicted_with(
    model, sampled, monkeypatch
):
    """By both forms of the decode loop, with fewer slots than rows: those of the trainer's form."""
    graph, params = model
    monkeypatch.setattr(decoding, "UNROLLED_LAYERS", 1)
    for sequences, weights in (sampled, (rollouts(graph, params, num_slots=2), params)):
        assert sequences["routed_experts"].dtype == np.int16 and routes.width(CONFIG) == 6
        for routed_tm in sequences.split("routed_experts"):
            assert (routed_tm[0] == -1).all() and (routed_tm[1:] >= 0).all()
        expected = 0, 6 * (sequences.lengths_b - 1).sum()
        assert missed_and_known(graph, weights, sequences) == expected


def test_what_differs_is_of_sampled_tokens_and_nothing_where_it_is_replayed(model, sampled):
    (sequences, _), (graph, params) = sampled, model
    objective = objective_of("forward", hard_labels=True)

    def measured(replays, layout):
        own = nnx.merge(graph, params)
        own.replays = replays
        own_graph, _ = nnx.split(own, nnx.Param)
        loss = jax.jit(make_loss(own_graph, None, objective, vocab_size=VOCAB))
        (batch,) = make_batch(sequences, layout=layout, pad_id=0)
        parts = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.lengths_b))]
        each = [loss(params, None, part, sequences["weight"].sum()) for part in parts]
        loss, sums = jax.tree.map(lambda *x: sum(x), *each)
        return float(loss), {name: float(sums[name]) for name in NUMBERS}

    whole, packed = Layout((Shape(6, 12),)), Layout((Shape(2, 12),), packed=True)
    _, compared = measured(False, whole)
    assert compared["routed_tokens"] == sequences["sampled"].sum()
    share = compared["routes_missed"] / compared["routed_tokens"]
    missed, known = missed_and_known(graph, params, sequences)
    assert 0.02 < share < 0.5 and share == pytest.approx(missed / known, abs=0.1)
    loss, replayed = measured(True, whole)
    assert replayed["routes_missed"] == 0 < replayed["routed_tokens"]
    # Neither padding nor microbatches change what is replayed.
    assert measured(True, packed)[0] == pytest.approx(loss, rel=1e-5)
