"""The train step with adapters: what they are worth, and what must not change their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from step_test import VOCAB_SIZE, make_model, make_rows, padded
from tiny_models import model_config, num_bytes

from benchmarks.objectives import objective_of
from distill.base.mesh import make_mesh
from distill.base.sharding import param_shardings
from distill.build.devices import put_batch
from distill.build.models import abstract_state, first_state
from distill.config.policy import Lora, Optimizer, Policy
from distill.models import lora
from distill.models.model import Model
from distill.models.quantization import quantize
from distill.step import TeacherInStep, TrainState, make_train_step

SETTINGS = Lora(rank=4, alpha=4.0, base_dtype="int8")
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
CONFIG = model_config(vocab_size=32, num_layers=2, model_width=32, ffn_width=64, tied=True)


@pytest.fixture(scope="module")
def student():
    return make_model(32, 2, 32, seed=1)


@pytest.fixture(scope="module")
def teacher():
    return make_model(64, 2, 40, seed=2, tied=False)


def make_step(graph, teacher, optimizer):
    objective = objective_of("forward")
    teachers = [TeacherInStep(teacher[0])]
    return make_train_step(graph, teachers, objective, optimizer, vocab_size=VOCAB_SIZE)


def copied(state: TrainState) -> TrainState:
    """For a step, which donates its state."""
    return jax.tree.map(jnp.copy, state)


def on(mesh, graph, params, dtype=jnp.float32) -> Model:
    """Shapes of the model on the mesh."""
    layout = param_shardings(params, mesh)
    return Model(
        graph,
        jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, dtype, sharding=y), params, layout),
    )


def in_8_bits(params) -> nnx.State:
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(p, quantize(CONFIG, "/".join(p), x)) for p, x in flat])


@pytest.fixture(scope="module")
def case(student, teacher):
    """A step with adapters of a base in 8 bits, and the state before it."""
    graph, params = student
    frozen = in_8_bits(params)
    shapes = lora.abstract_adapters(params, SETTINGS)
    random = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.05, x.shape), x.dtype), shapes)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, adapters, OPTIMIZER.init(adapters), frozen)
    return make_step(graph, teacher, OPTIMIZER), state


@pytest.fixture(scope="module")
def stepped(case, teacher):
    step, state = case
    return step(copied(state), [teacher[1]], make_rows().batch(padded(1)))


def assert_near(ours, theirs):
    flat = dict(nnx.to_flat_state(theirs))
    for path, x in nnx.to_flat_state(ours):
        name, theirs = "/".join(path), flat[path].get_value()
        np.testing.assert_allclose(x.get_value(), theirs, rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_base_stays_to_the_bit_and_the_adapters_move(case, stepped):
    (_, before), (after, _) = case, stepped
    kept = jax.tree.leaves(after.frozen)
    assert jnp.dtype("int8") in {x.dtype for x in kept}
    for ours, theirs in zip(kept, jax.tree.leaves(before.frozen), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (after.trainable, before.trainable)), strict=True
    ):
        assert np.abs(ours - theirs).max() > 0


def test_update_does_not_depend_on_microbatches(case, stepped, teacher):
    step, state = case
    after, metrics = step(copied(state), [teacher[1]], make_rows().batch(padded(4)))
    assert float(metrics["loss"]) == pytest.approx(float(stepped[1]["loss"]), rel=1e-5)
    assert_near(after.trainable, stepped[0].trainable)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_update_does_not_depend_on_the_mesh(case, stepped, student, teacher, sizes):
    step, state = case
    mesh, policy, state = make_mesh(*sizes), Policy(lora=SETTINGS), copied(state)
    with jax.set_mesh(mesh):
        shapes = abstract_state(on(mesh, *student), CONFIG, OPTIMIZER, mesh, policy)
        assert jax.tree.structure(shapes) == jax.tree.structure(state)
        placed = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
        teacher_params = jax.device_put(teacher[1], param_shardings(teacher[1], mesh))
        batch = put_batch(mesh, make_rows().batch(padded(1)))
        after, metrics = step(placed, [teacher_params], batch)
    assert float(metrics["loss"]) == pytest.approx(float(stepped[1]["loss"]), rel=1e-5)
    assert_near(after.trainable, stepped[0].trainable)


def test_full_rank_is_full_fine_tuning_of_the_matrix(student, teacher):
    """With a square and orthogonal first factor, the step of SGD is that of the matrix itself."""
    graph, params = student
    name, optimizer, zero = "k_proj", optax.sgd(0.1), jnp.zeros((), jnp.int32)
    batch = make_rows().batch(padded(1))
    others, own = nnx.split_state(params, lambda path, _: path[-1] != name, ...)
    full = TrainState(zero, own, optimizer.init(own), others)
    full, whole = make_step(graph, teacher, optimizer)(copied(full), [teacher[1]], batch)
    outputs = own["layers"][name].get_value()[0, 0].size
    adapters = lora.abstract_adapters(params, Lora(rank=outputs, alpha=outputs, targets=(name,)))
    random = np.random.default_rng(0)
    b = np.linalg.qr(random.normal(size=(2, outputs, outputs)))[0]
    shape = adapters["layers"][name]["b"].get_value().shape
    made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), adapters)
    made["layers"][name]["b"] = made["layers"][name]["b"].replace(
        jnp.asarray(b.reshape(shape), jnp.float32)
    )
    state = TrainState(zero, made, optimizer.init(made), params)
    state, metrics = make_step(graph, teacher, optimizer)(copied(state), [teacher[1]], batch)
    merged = lora.merged(state.params, jnp.float32)
    for key in ("loss", "grad_norm", "update_norm"):
        assert float(metrics[key]) == pytest.approx(float(whole[key]), rel=1e-5)
    np.testing.assert_allclose(
        merged["layers"][name].get_value(),
        full.trainable["layers"][name].get_value(),
        rtol=1e-5,
        atol=1e-6,
    )
    moved = merged["layers"][name].get_value() - own["layers"][name].get_value()
    assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("base", ["auto", "int8"])
def test_state_gradients_and_checkpoints_are_of_the_adapters_size(student, base):
    """In bytes: a checkpoint, `state.saved`, has three float32 numbers for each of an adapter's."""
    mesh, optimizer = make_mesh(2, 2, 2), optax.adamw(1e-3)
    params, model = student[1], on(mesh, *student, jnp.bfloat16)
    counters = 4 + 4  # of the state and of Adam

    def saved(rank: int) -> int:
        policy = Policy(lora=Lora(rank=rank, base_dtype=base), optimizer=Optimizer())
        state = abstract_state(model, CONFIG, optimizer, mesh, policy)
        sides = 0
        for path, x in nnx.to_flat_state(params):
            if path[-1].endswith("_proj"):
                inputs = 2 if path[-1] == "o_proj" else 1
                of_layer = x.get_value().shape[1:]
                sides += 2 * (np.prod(of_layer[:inputs]) + np.prod(of_layer[inputs:]))
        assert num_bytes(state.trainable) == 4 * rank * sides
        assert num_bytes(state.saved) == 3 * num_bytes(state.trainable) + counters
        if base == "auto":
            assert num_bytes(state.frozen) == num_bytes(model.params)
        else:
            assert num_bytes(state.frozen) < 0.7 * num_bytes(model.params)
        return num_bytes(state.saved) - counters

    assert saved(4) == 2 * saved(2)


def test_first_state_is_laid_out_as_planned_and_the_same_on_every_mesh(student):
    graph, params = student
    optimizer, policy, made = optax.adamw(1e-3), Policy(lora=Lora(rank=2)), []
    for mesh in make_mesh(2, 2, 2), make_mesh(8):
        expected = abstract_state(on(mesh, graph, params), CONFIG, optimizer, mesh, policy)
        base = jax.device_put(params, param_shardings(params, mesh))
        state = first_state(base, optimizer, expected, seed=0)
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        for ours, theirs in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        made.append(state)
    for ours, theirs in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(ours, theirs)
