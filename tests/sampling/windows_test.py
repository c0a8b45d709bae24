"""Sampling from models whose layers attend to a window, have soft-caps, sinks and other scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simple_decode import simple_decode
from tiny_models import model_config, num_bytes, random_model

from distill.base.mesh import make_mesh
from distill.base.sharding import SAMPLER_RULES, param_shardings, partition_spec
from distill.kernels.decode_attention import Kernel
from distill.models.cache import Axes, LayerCache, empty_cache
from distill.models.decoding import UNROLLED_LAYERS
from distill.sampling import cache as caches
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

VOCAB, PAD = 29, 0
WINDOW = 9  # shorter than most prompts, than a call's steps, and than the ring that holds it
LOG_PROB_TOLERANCE = 2e-5

SLIDING = dict(pattern=("sliding", "full"), window=WINDOW)
MODELS = {
    "sliding": dict(pattern=("sliding",), window=WINDOW),
    "sliding_and_full": SLIDING | dict(num_layers=3),
    "window_fills_its_ring": SLIDING | dict(window=32),
    "soft_cap_and_scale": dict(attention_soft_cap=1.5, attention_scale=0.5),
    "sinks": dict(sinks=True),
    "all": SLIDING | dict(attention_soft_cap=1.5, attention_scale=0.5, sinks=True),
    "scanned": SLIDING | dict(num_layers=UNROLLED_LAYERS + 1),
}


def config_of(**facts):
    return model_config("qwen3", max_positions=256, **facts)


def make_request(max_length=60, num_generations=2) -> RolloutRequest:
    random = np.random.default_rng(0)
    sizes = [1, 5, WINDOW, WINDOW + 1, 20, 31, 32, 33, 50, 90]
    prompts = tuple(random.integers(4, VOCAB, size).astype(np.int32) for size in sizes)
    params = SamplingParams(max_length=max_length)
    rows = len(sizes) * num_generations
    return RolloutRequest(
        prompts,
        np.arange(len(sizes)),
        params,
        num_generations=num_generations,
        max_lengths=random.integers(1, max_length + 1, rows).astype(np.int32),
    )


def make_engine(graphdef, **sizes) -> Engine:
    config = EngineConfig(**{"max_length": 160, "num_slots": 6, **sizes})
    return Engine(graphdef, config, eos_ids=(), pad_id=PAD, vocab_size=VOCAB)


def assert_as_defined(rollout, graphdef, weights, request):
    ends = dict(eos_ids=(), pad_id=PAD, vocab_size=VOCAB)
    expected = simple_decode(graphdef, weights, request, **ends)
    for name in ("lengths_b", "stopped_b", "tokens_br"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name), name)
    actual, desired = rollout.log_probs_br, expected.log_probs_br
    np.testing.assert_allclose(actual, desired, rtol=0, atol=LOG_PROB_TOLERANCE)
    assert expected.lengths_b.max() > 40


@pytest.mark.parametrize("facts", MODELS.values(), ids=MODELS)
def test_same_responses_as_defined(facts):
    """Prompts and responses longer than the window and than the ring, several to a prompt."""
    graphdef, weights = random_model(config_of(**facts))
    engine, request = make_engine(graphdef), make_request()
    rollout, _ = engine.generate(weights, request)
    assert_as_defined(rollout, graphdef, weights, request)


def test_sharded_over_a_mesh():
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    graphdef, weights = random_model(config_of(**MODELS["all"]))
    placed = jax.device_put(weights, param_shardings(weights, mesh, SAMPLER_RULES))
    with jax.set_mesh(mesh):
        rollout, _ = make_engine(graphdef).generate(placed, make_request())
    assert_as_defined(rollout, graphdef, weights, make_request())


def test_sliding_layers_keep_their_window_only():
    """And 8-bit integers are kept in a ring, too."""
    graphdef, weights = random_model(config_of(**SLIDING))
    exact, small = make_engine(graphdef), make_engine(graphdef, int8=True)
    expected, _ = exact.generate(weights, make_request())
    rollout, _ = small.generate(weights, make_request())
    sliding, full = (exact.slots.cache[kind] for kind in ("sliding", "full"))
    assert sliding.ring and sliding.k_lpckhs.shape == (1, 1, 6, 2, 8, 32)
    assert not full.ring and full.k_lpckhs.shape == (1, 1, 6, 2, 8, 256)
    assert exact.slots.slot_bytes(weights) * 6 == num_bytes(exact.slots.cache)
    same_br = np.cumprod(rollout.tokens_br == expected.tokens_br, axis=1).astype(bool)
    same_br &= np.arange(same_br.shape[1]) < expected.lengths_b[:, None]
    assert same_br.sum() > 100
    gap_br = np.abs(rollout.log_probs_br - expected.log_probs_br)[same_br]
    assert 1e-4 < gap_br.mean() < 0.05


def test_kernel_that_was_asked_for_refuses_a_window():
    graphdef, weights = random_model(config_of(**SLIDING))
    with pytest.raises(ValueError, match="cannot attend to a window of 9 tokens; choose 'xla'"):
        make_engine(graphdef, attention=Kernel(interpret=True)).generate(weights, make_request())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache(LayerCache):
    """Of a layer that keeps no positions."""

    state_lpckh: jax.Array

    def axes(self):
        return {"state_lpckh": Axes(("layers", "batch", None, "act_kv_heads", None))}


def test_a_state_is_inserted_moved_replaced_and_counted_like_keys():
    shape = dict(heads=2, width=4)
    cache = (
        StateCache(jnp.zeros((3, 1, 5, *shape.values()))),
        empty_cache(config_of(), 1, 5, 32, jnp.float32, False)["full"],
    )

    def rows(count, positions, seed):
        random = np.random.default_rng(seed)
        shapes = (3, 1, count, 2, 4), (2, 1, count, 2, 8, positions), (2, 1, count, 2, positions, 8)
        state, k, v = (jnp.asarray(random.normal(size=x), jnp.float32) for x in shapes)
        return StateCache(state), dataclasses.replace(cache[1], k_lpckhs=k, v_lpcksh=v)

    new, tail = rows(2, 16, 0), rows(3, 4, 1)
    numbers = [jnp.array([x]) for x in ([1, 0, 0], [0, 2, 5], [7, 9, 9])]  # there is no slot 5
    cache = caches.insert(cache, new, *numbers)
    np.testing.assert_array_equal(cache[0].state_lpckh[:, :, 0], new[0].state_lpckh[:, :, 1])
    np.testing.assert_array_equal(cache[0].state_lpckh[:, :, 2], new[0].state_lpckh[:, :, 0])
    np.testing.assert_array_equal(cache[1].k_lpckhs[:, :, 2, ..., :16], new[1].k_lpckhs[:, :, 0])
    assert not cache[0].state_lpckh[:, :, 4].any()  # nor is the last one written
    cache = caches.move(cache, jnp.array([[0], [2]]), jnp.array([[1], [3]]), 1)
    np.testing.assert_array_equal(cache[0].state_lpckh[:, :, 1], new[0].state_lpckh[:, :, 1])
    assert not cache[0].state_lpckh[:, :, 3].any()
    cache = caches.append(cache, tail, jnp.array([[7, 7, 9]]), jnp.int32(4))
    np.testing.assert_array_equal(cache[0].state_lpckh[:, :, :3], tail[0].state_lpckh)
    np.testing.assert_array_equal(cache[1].v_lpcksh[:, :, 2, :, 9:13], tail[1].v_lpcksh[:, :, 2])
    assert num_bytes(cache) == 4 * (3 * 5 * 8 + 2 * 2 * 5 * 2 * 8 * 32)
    state_spec = caches.partition_specs(cache)[0].state_lpckh
    assert state_spec == partition_spec(("layers", "batch", None, "act_heads", None))
    assert state_spec[3] == "tensor" and {"data", "fsdp"} < set(state_spec[1])
