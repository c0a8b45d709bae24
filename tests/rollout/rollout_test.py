"""In-process backends: weights move only by refit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config, random_model

from distill.base.mesh import make_mesh, make_sampler_mesh
from distill.base.sharding import SAMPLER_RULES, named_sharding, param_shardings, replicated
from distill.models.quantization import quantized
from distill.rollout import remote
from distill.rollout.base import RolloutBackend
from distill.rollout.in_process import JaxBackend
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import Rollout, RolloutRequest

CONFIG = model_config("qwen3", num_heads=2, num_kv_heads=1, tied=False)
PARAMS = SamplingParams(max_length=6)
OPTIONS = {"eos_ids": (3,), "pad_id": 0, "vocab_size": 32}
PROMPTS = tuple(np.array(prompt, np.int32) for prompt in ([4, 5, 6], [7, 8], [9]))
REQUEST = RolloutRequest(PROMPTS, np.array([0, 1, 2]), PARAMS, num_generations=2)


@functools.cache
def student(seed=0, dtype=jnp.float32):
    return random_model(CONFIG, seed=seed, dtype=dtype)


@functools.cache
def backend(dtype=jnp.float32) -> RolloutBackend:
    """One per type, to compile once; every test refits it first."""
    return make_backend(dtype)


def make_backend(dtype=jnp.float32, **placement) -> RolloutBackend:
    engine = Engine(student(dtype=dtype)[0], EngineConfig(max_length=16), **OPTIONS)
    made = JaxBackend(engine, dtype=dtype, **placement)
    made.start()
    return made


def generate(sampler: RolloutBackend, **changes) -> Rollout:
    return sampler.generate(dataclasses.replace(REQUEST, **changes))[0]


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_generates_with_cast_weights_and_request_keys():
    dtype = jnp.bfloat16
    graphdef, params = student(dtype=dtype)
    sampler = backend(dtype)
    sampler.refit(params, version=0)
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    request = dataclasses.replace(REQUEST, seed=7, step=3)
    expected, _ = Engine(graphdef, EngineConfig(max_length=16), **OPTIONS).generate(cast, request)
    assert_equal(generate(sampler, seed=7, step=3), expected)
    assert {x.dtype for x in jax.tree.leaves(sampler._weights.of(REQUEST))} == {jnp.dtype(dtype)}


def test_refit_makes_generation_use_the_new_weights():
    sampler = backend()
    rollouts = []
    for seed in (0, 1, 0):
        sampler.refit(student(seed)[1], version=0)
        rollouts.append(generate(sampler))
    assert (rollouts[0].log_probs_br != rollouts[1].log_probs_br).all(axis=1).any()
    assert_equal(rollouts[0], rollouts[2])


def test_requests_name_the_weights_that_sample():
    """So many as batches may wait are held, and older ones are freed before others come."""
    sampler, alone = make_backend(num_held=2), make_backend()
    expected = []
    for seed in (0, 1, 2):
        alone.refit(student(seed)[1], version=seed)
        expected.append(generate(alone))
        sampler.refit(student(seed)[1], version=seed)
        for version in range(max(0, seed - 1), seed + 1):
            assert_equal(generate(sampler, version=version), expected[version])
    with pytest.raises(RuntimeError, match="no weights of 0 updates are held"):
        generate(sampler, version=0)
    with pytest.raises(RuntimeError, match="no weights of 1 updates are held"):
        generate(alone, version=1)
    assert_equal(generate(sampler), expected[2])  # those of the last refit


def test_held_weights_outlive_the_trainers_buffers():
    """The trainer donates its parameters to the next step; float32 needs no cast, yet a copy."""
    sampler = backend()
    params = jax.tree.map(jnp.copy, student()[1])
    sampler.refit(params, version=0)
    before = generate(sampler)
    jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)(params)
    assert jax.tree.leaves(params)[0].is_deleted()
    assert_equal(generate(sampler), before)


def test_randomness_comes_from_seed_step_and_indices():
    sampler = backend()
    sampler.refit(student()[1], version=0)

    def tokens(**changes):
        return generate(sampler, **changes).tokens_br.tolist()

    first = tokens()
    assert tokens() == first
    assert tokens(seed=2**40) == first  # taken modulo 2**32
    assert tokens(seed=1) != first
    assert tokens(step=1) != first
    assert tokens(prompt_index=np.array([3, 4, 5])) != first
    assert first[0] != first[1]  # two answers to one prompt


def test_generate_before_refit_and_after_stop_is_an_error():
    sampler = make_backend()
    with pytest.raises(RuntimeError, match="before refit"):
        generate(sampler)
    sampler.refit(student()[1], version=0)
    sampler.stop()
    with pytest.raises(RuntimeError, match="before refit"):
        generate(sampler)


def cut_output_head(mesh) -> nnx.State:
    """Shardings of a student of which only the output head is split, by embed and vocabulary."""
    shardings = jax.tree.map(lambda _: replicated(mesh), student()[1])
    shardings["output_head"] = jax.tree.map(
        lambda _: named_sharding(mesh, "embed", "vocab"), shardings["output_head"]
    )
    return shardings


def assert_close(rollout: Rollout, expected: Rollout):
    np.testing.assert_array_equal(rollout.tokens_br, expected.tokens_br)
    np.testing.assert_allclose(rollout.log_probs_br, expected.log_probs_br, atol=2e-5)


def test_refit_reshards_to_the_given_shardings():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = student()[1]
    alone, sharded = backend(), make_backend(shardings=cut_output_head(mesh))
    request = dict(num_generations=4, prompts=PROMPTS[:2], prompt_index=np.arange(2))
    alone.refit(params, version=0)
    expected = generate(alone, **request)
    with jax.set_mesh(mesh):
        sharded.refit(params, version=0)
        rollout = generate(sharded, **request)
    head = jax.tree.leaves(sharded._weights.of(REQUEST)["output_head"])[0]
    assert head.sharding.shard_shape(head.shape) == (8, 16)
    assert_close(rollout, expected)


def test_what_is_told_between_processes_is_the_same_there():
    """A request to the sampler's, and a rollout with columns to the trainer's."""
    limits = np.array([6, 5, 4, 3, 2, 1], np.int32)
    request = dataclasses.replace(REQUEST, version=3, seed=7, step=2, max_lengths=limits)
    arrays, facts = remote._of_request(request)
    there = remote._to_request(remote._with_facts(arrays, **facts), None, None)
    assert_equal(dataclasses.astuple(there), dataclasses.astuple(request))
    sampler = backend()
    sampler.refit(student()[1], version=3)
    rollout, measured = sampler.generate(there)
    more = dict(weight=[np.float32(prompt) for prompt in PROMPTS for _ in range(2)])
    columns = dict(reward=np.arange(6, dtype=np.float32))
    rollout = dataclasses.replace(rollout, columns=columns, prompt_columns=more)
    made = remote._of_rollout(rollout, measured)
    assert remote._facts(made) == measured
    assert_equal(remote._to_rollout(made, request), rollout)


def test_a_sampler_splits_weights_in_a_layout_of_its_own():
    """On the trainer's devices: heads two ways, MLPs four."""
    mesh = make_mesh(data=1, fsdp=8)
    sampler_mesh = make_sampler_mesh(mesh, list(mesh.devices.flat), tensor=2, width=2)
    assert dict(sampler_mesh.shape) | dict(data=2, tensor=2, width=2) == dict(sampler_mesh.shape)
    config = dataclasses.replace(CONFIG, num_kv_heads=2, ffn_width=16)
    graph, params = random_model(config, seed=0)
    shardings = param_shardings(params, sampler_mesh, SAMPLER_RULES)

    def made(**placement) -> RolloutBackend:
        engine = Engine(graph, EngineConfig(max_length=16), **OPTIONS)
        return JaxBackend(engine, dtype=jnp.float32, **placement)

    alone, split = made(), made(shardings=shardings, mesh=sampler_mesh)
    alone.refit(params, version=0)
    expected = generate(alone, num_generations=4)
    with jax.set_mesh(mesh):
        split.refit(jax.device_put(params, param_shardings(params, mesh)), version=0)
        rollout = generate(split, num_generations=4)
    up = split._weights.of(REQUEST)["layers"]["up_proj"].get_value()
    assert up.sharding.shard_shape(up.shape)[-1] == 4
    assert_close(rollout, expected)


def test_a_sampler_in_8_bits_is_the_quantized_student():
    graph, params = student()
    finish = functools.partial(quantized, nnx.merge(graph, params).config)
    sampler, exact = make_backend(finish=finish), backend()
    for each in (sampler, exact):
        each.refit(params, version=0)
    held = sampler._weights.of(REQUEST)["layers"]["up_proj"].get_value()
    assert held.qvalue.dtype == jnp.int8
    rollout = generate(sampler)
    engine = Engine(graph, EngineConfig(max_length=16), **OPTIONS)
    expected, _ = engine.generate(finish(params), REQUEST)
    assert_equal(rollout, expected)
    assert (rollout.log_probs_br != generate(exact).log_probs_br).any()


def test_sampler_with_its_own_devices_gets_its_weights_there():
    """Cut like the trainer's; the trainer's buffers may go as soon as refit has returned."""
    devices = jax.devices()
    mesh = make_mesh(1, 2, 2, devices=devices[:4])
    sampler_mesh = make_sampler_mesh(mesh, devices[4:])
    sampler = make_backend(shardings=cut_output_head(mesh), mesh=sampler_mesh)
    request = dict(num_generations=4)
    alone = backend()
    alone.refit(student()[1], version=0)
    expected = generate(alone, **request)
    with jax.set_mesh(mesh):  # as in the trainer: the backend must leave its caller's mesh
        params = jax.device_put(student()[1], replicated(mesh))
        sampler.refit(params, version=0)
        jax.tree.map(lambda x: x.delete(), params)
        rollout = generate(sampler, **request)
    for weight in jax.tree.leaves(sampler._weights.of(REQUEST)):
        assert weight.sharding.device_set == set(devices[4:])
    head = jax.tree.leaves(sampler._weights.of(REQUEST)["output_head"])[0]
    assert head.sharding.shard_shape(head.shape) == (16, 16)
    assert_close(rollout, expected)
