"""The student as its own teacher: current weights, their moving average, those it started from."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_test import ROWS, VOCAB_SIZE, assert_same, make_model, make_rows, padded
from tiny_runs import read_metrics, tiny_config, train_killed, with_models

import distill
from benchmarks.objectives import objective_of
from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.build.devices import put_batch
from distill.build.teachers import FROM_STATE, part_of_state
from distill.config.parse import parse_config
from distill.config.policy import Lora
from distill.config.schema import all_teachers
from distill.models import lora
from distill.step import AveragedState, TeacherInStep, TrainState, make_train_step

DECAY = 0.75


@pytest.fixture(scope="module")
def student():
    return make_model(32, 1, 32, seed=1, num_kv_heads=4)


@pytest.fixture(scope="module")
def rows():
    """What the teacher reads has a prompt of its own."""
    rng = np.random.default_rng(3)
    prompts = tuple(rng.integers(1, VOCAB_SIZE, 4).astype(np.int32) for _ in range(ROWS))
    return dataclasses.replace(make_rows(), view_prompts=prompts)


OPTIMIZER = optax.sgd(0.5)
PARTS = "trainable", "average"
LAYOUT = dataclasses.replace(padded(2), view_excess=8)


def make_step(student, kind=None):
    return make_train_step(
        student[0],
        [TeacherInStep(student[0], kind and FROM_STATE[kind])],
        objective_of("forward"),
        OPTIMIZER,
        vocab_size=VOCAB_SIZE,
        ema_decay=DECAY,
    )


@pytest.fixture(scope="module")
def given(student):
    """The step whose teacher is an argument."""
    return make_step(student)


@pytest.fixture(scope="module")
def averaging(student):
    return make_step(student, "ema")


def first_state(student, kind=TrainState, **parts):
    params = jax.tree.map(jnp.copy, student[1])
    return kind(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), **parts)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=["device", "mesh"])
def test_average_of_the_weights_is_the_teacher(student, rows, given, averaging, sizes):
    """Against updates with a teacher that is given, and an average made beside them."""
    batch = rows.batch(LAYOUT)
    params, average, expected = student[1], student[1], []
    for _ in range(2):
        state, metrics = given(first_state((None, params)), [average], batch)
        params = state.params
        average = jax.tree.map(lambda a, p: DECAY * a + (1 - DECAY) * p, average, params)
        expected.append(float(metrics["loss"]))
    assert 0 < expected[0] != expected[1]
    state = first_state(student, AveragedState, average=jax.tree.map(jnp.copy, student[1]))
    mesh = None
    if sizes:
        mesh = make_mesh(*sizes)
        batch, layout = put_batch(mesh, batch), param_shardings(student[1], mesh)
        put = {name: jax.device_put(getattr(state, name), layout) for name in PARTS}
        state = dataclasses.replace(state, **put)
    losses = []
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        for _ in range(2):
            state, metrics = averaging(state, [None], batch)
            losses.append(float(metrics["loss"]))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_same(jax.device_get((state.params, state.average)), jax.device_get((params, average)))


def test_current_weights_are_the_teacher_and_get_no_gradient(student, rows, given):
    batch = rows.batch(LAYOUT)
    expected, _ = given(first_state(student), [student[1]], batch)
    own, metrics = make_step(student, "self")(first_state(student), [None], batch)
    assert float(metrics["grad_norm"]) > 1e-3
    assert_same(own.params, expected.params)


def test_what_the_student_was_is_the_base_of_its_adapters(student, rows, given):
    batch, rng = rows.batch(LAYOUT), np.random.default_rng(0)
    shapes = lora.abstract_adapters(student[1], Lora(rank=2, alpha=4.0))
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)
    merged = lora.merged(lora.attach(student[1], adapters), jnp.float32)
    _, expected = given(first_state((None, merged)), [student[1]], batch)
    base, zero = jax.tree.map(jnp.copy, student[1]), jnp.zeros((), jnp.int32)
    state = TrainState(zero, adapters, OPTIMIZER.init(adapters), base)
    _, metrics = make_step(student, "start")(state, [None], batch)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, True),
        ({"policy.lora.rank": 0}, False),
        ({"policy.lora.base_dtype": "int8"}, False),
        ({"teacher.precision": "bfloat16"}, False),
        ({"teacher.offload": "host"}, False),
    ],
)
def test_the_base_is_shared_where_it_is_stored_as_the_teacher_would_be(changes, shared):
    config = tiny_config()
    config.distillation.teacher_model_path, config.policy.lora.rank = "start", 2
    config.teacher.prompt_template = "{answer}={problem}"
    config.update_from_flattened_dict(changes)
    parsed = parse_config(config)
    [section] = all_teachers(parsed).values()
    assert (part_of_state(parsed, section) is not None) == shared


def test_average_stays_where_an_update_is_skipped(student, rows, averaging):
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), student[1])
    state = first_state(student, AveragedState, average=jax.tree.map(jnp.copy, bad))
    new, metrics = averaging(state, [None], rows.batch(LAYOUT))
    assert float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, new.average, bad)


def own_config(models, kind):
    config = with_models(tiny_config(max_steps=3, save_steps=2, eval_steps=2), models)
    config.distillation.teacher_model_path = kind
    config.teacher.prompt_template = "{answer}={problem}"
    config.teacher.ema_decay = DECAY if kind == "ema" else 0.0
    config.mesh.fsdp = 2
    return config


def test_killed_run_with_an_average_resumes_to_the_same_bits(models, tmp_path, monkeypatch):
    whole = distill.train(own_config(models, "ema"), tmp_path / "whole")
    assert whole.results.keys() == {"base", "student"} and whole.results["base"]["forward_kl"] > 0
    train_killed(own_config(models, "ema"), tmp_path / "killed", monkeypatch, step=3)
    again = distill.train(own_config(models, "ema"), tmp_path / "killed")
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (whole.student / weights).read_bytes()
    assert again.results == whole.results
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")
