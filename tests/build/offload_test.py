"""Weights and moments in host memory, and 8-bit weights: where they are, and the same results."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from tiny_models import model_config, random_model
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import HOST_MEMORY, check_host_memory, param_shardings
from distill.build.devices import put_batch
from distill.build.session import open_session
from distill.config.parse import parse_config
from distill.models.quantization import dequantize, quantize


def memory_kinds(arrays) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(arrays)}


def small_config(models, **teacher):
    config = with_models(tiny_config(max_steps=3, save_steps=2), models)
    config.mesh.data, config.mesh.fsdp = 4, 2
    config.data.validation.max_samples = 0
    config.teacher.update(teacher)
    return config


def run(config, workdir) -> list[dict]:
    distill.train(config, workdir)
    return read_metrics(workdir)


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory) -> list[dict]:
    return run(small_config(models), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("offload", ["host", "layers"])
def test_run_with_an_offloaded_teacher_is_the_same(models, plain, tmp_path, offload):
    assert run(small_config(models, offload=offload), tmp_path) == plain


def test_run_with_an_offloaded_optimizer_is_the_same(models, plain, tmp_path):
    """Also when it goes on from step 2: the moments are put back where they were."""
    config = small_config(models)
    config.policy.optimizer.offload = "host"
    assert run(config, tmp_path) == plain
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert run(config, tmp_path) == plain


@pytest.mark.parametrize("offload", ["none", "host", "layers"])
def test_teacher_is_where_the_config_says(models, offload):
    with open_session(parse_config(small_config(models, offload=offload))) as session:
        teacher = session.load_teachers()[""]
        layers = teacher.model.params["layers"]
        matrices = {name: layers[name] for name in ("q_proj", "o_proj", "down_proj", "q_bias")}
        assert memory_kinds(matrices) == {"device" if offload == "none" else HOST_MEMORY}
        ends = HOST_MEMORY if offload == "host" else "device"
        assert memory_kinds(teacher.model.params["embedding"]) == {ends}
        fetched = memory_kinds(teacher.fetch()["layers"]["q_proj"])
        assert fetched == {HOST_MEMORY if offload == "layers" else "device"}


def test_moments_are_in_host_memory_before_and_after_a_step(models):
    from step_test import make_rows, padded

    from distill.step import TeacherInStep, make_train_step

    config = small_config(models)
    config.policy.optimizer.offload = "host"
    with open_session(parse_config(config)) as session:
        state, teacher = session.load_state(), session.load_teachers()[""]
        step = make_train_step(
            session.student.graph, [TeacherInStep(teacher.graph)], session.objective,
            session.optimizer,
            vocab_size=17,
            state_shardings=jax.tree.map(lambda x: x.sharding, state),
        )  # fmt: skip

        def large(state):
            return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]

        assert memory_kinds(large(state)) == {HOST_MEMORY}
        (rows,) = make_rows().batch(padded(1))
        rows = dataclasses.replace(rows, tokens_bt=rows.tokens_bt % 17)
        batch = put_batch(session.mesh, (rows,))
        before = jax.device_get(large(state))
        state, metrics = step(state, [teacher.model.params], batch)
        assert float(metrics["update_norm"]) > 0
        assert memory_kinds(large(state)) == {HOST_MEMORY}
        assert memory_kinds(state.params) == {"device"}
        after = jax.device_get(large(state))
        assert any((a != b).any() for a, b in zip(before, after, strict=True))


def test_platform_without_host_memory_is_told():
    class Device:
        process_index, platform = 0, "toaster"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "crumbs"})]

    class DeviceMesh:
        devices = np.array([Device()])

    with pytest.raises(UserError, match="toaster devices have only crumbs: set teacher.offload=no"):
        check_host_memory(DeviceMesh(), "teacher.offload")


# ---- 8 bits ----


@pytest.mark.parametrize("mesh_sizes", [None, (2, 2, 2)])
def test_matrices_are_rounded_per_output_channel(mesh_sizes):
    config = model_config()
    _, params = random_model(config)
    if mesh_sizes:
        params = jax.device_put(params, param_shardings(params, make_mesh(*mesh_sizes)))
    for path, param in nnx.to_flat_state(params):
        value, found = param.get_value(), quantize(config, "/".join(path), param).get_value()
        inputs = {"q_proj": (1,), "k_proj": (1,), "v_proj": (1,), "o_proj": (1, 2)}
        inputs |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (1,))
        if path[-1] not in inputs:
            assert found is value
            continue
        assert found.qvalue.dtype == jnp.int8 and found.qvalue.sharding == value.sharding
        step = np.abs(value).max(axis=inputs[path[-1]], keepdims=True) / 127
        np.testing.assert_allclose(found.scale, step, rtol=0.01)
        error = np.abs(dequantize(found, jnp.float32) - value)
        assert (error <= 0.51 * step).all() and error.max() > 0.3 * step.min()


def test_layers_of_an_8_bit_model_are_what_its_matrices_say():
    """Against a model whose weights were rounded beforehand."""
    config = model_config()
    graph, params = random_model(config)
    names = ["/".join(path) for path, _ in nnx.to_flat_state(params)]
    flat = [param for _, param in nnx.to_flat_state(params)]
    quantized = [quantize(config, *pair) for pair in zip(names, flat, strict=True)]
    rounded = [x.replace(dequantize(x.get_value(), jnp.float32)) for x in quantized]
    paths = [path for path, _ in nnx.to_flat_state(params)]
    tokens_bt = np.random.default_rng(0).integers(0, 32, (2, 9))

    def hidden(values):
        return nnx.merge(graph, nnx.from_flat_state(list(zip(paths, values, strict=True))))(
            tokens_bt
        )

    np.testing.assert_allclose(hidden(quantized), hidden(rounded), atol=1e-5)
    assert np.abs(hidden(quantized) - hidden(flat)).max() > 1e-3


@pytest.mark.parametrize("offload", ["none", "host", "layers"])
def test_run_with_an_8_bit_teacher_logs_what_that_costs(models, tmp_path, offload):
    lines = run(small_config(models, precision="int8", offload=offload), tmp_path)
    [kl] = [line["teacher/quantization_kl"] for line in lines if "teacher/quantization_kl" in line]
    assert 0 < kl < 0.01
    assert lines[-1]["step"] == 3


def test_logged_divergence_is_that_of_the_two_teachers(models):
    """Against log-softmax of both models' logits, on the same prompts."""
    config = small_config(models, precision="int8")
    config.policy.model_name = "embedded:arithmetic-student"
    config.distillation.teacher_model_path = "embedded:arithmetic-teacher"
    with open_session(parse_config(config)) as session:
        prompts, vocabulary = session.prompts, session.vocabulary
        teacher = session.load_teachers(compares=True)[""]
        full = session.load_frozen(session.teacher_folders[""], "bfloat16")
        assert isinstance(teacher.model.params["layers"]["q_proj"].get_value(), qwix.QArray)
        size = config.evaluation.batch_size
        lengths_b = np.array([len(prompt) for prompt in prompts.prompt_tokens[:size]])
        tokens_bt = np.zeros((size, lengths_b.max()), np.int32)
        for row, prompt in enumerate(prompts.prompt_tokens[:size]):
            tokens_bt[row, : len(prompt)] = prompt

        def log_probs(model_graph, params):
            module = nnx.merge(model_graph, params)
            return jax.nn.log_softmax(module.logits(module(tokens_bt))[..., : vocabulary.size])

        log_p, log_q = (
            jax.jit(log_probs, static_argnums=0)(x.graph, x.params) for x in (full, teacher.model)
        )
        kl_bt = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        expected = kl_bt[np.arange(tokens_bt.shape[1]) < lengths_b[:, None]].mean()
    print(f"KL of the embedded teacher in 8 bits: {teacher.quantization_kl:.2e} nats per token")
    assert 1e-6 < teacher.quantization_kl == pytest.approx(float(expected), rel=0.02)
