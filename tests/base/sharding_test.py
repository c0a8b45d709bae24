"""No large array is silently on every device: what a run holds, as it was compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_test import make_rows, padded
from tiny_runs import random_model, tiny_config

from distill.build.devices import put_batch
from distill.build.session import open_session
from distill.config.parse import parse_config
from distill.models.model import Model
from distill.sampling.choice import SamplingParams
from distill.sampling.request import RolloutRequest
from distill.step import TeacherInStep, make_train_step

LARGE = 100  # elements; norms and biases of the toy models have up to 32


def too_large(shapes, shardings, parts: int) -> list[str]:
    """Large arrays of which a device holds more than one of `parts`."""
    names = []
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, shape), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        held = np.prod(sharding.shard_shape(shape.shape))
        if shape.size >= LARGE and held * parts > shape.size:
            names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return names


def held(arrays, parts: int) -> list[str]:
    return too_large(arrays, jax.tree.map(lambda x: x.sharding, arrays), parts)


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run on 8 devices."""

    config: object
    mesh: object
    vocabulary: object
    teacher: Model
    state: object
    compiled: object
    backend: object


@pytest.fixture(scope="module", params=[False, True], ids=["as student", "spread"])
def run(request, tmp_path_factory) -> Run:
    config = tiny_config()
    # As many rows as the teacher has, which 2 divides.
    config.policy.model_name = random_model(model_width=16, vocab_size=24)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.teacher.split_over_data = request.param
    workdir = tmp_path_factory.mktemp("run")
    with open_session(parse_config(config), workdir) as session:
        state, teacher = session.load_state(), session.load_teachers()[""].model
        step = make_train_step(
            session.student.graph,
            [TeacherInStep(teacher.graph)],
            session.objective,
            session.optimizer,
            vocab_size=session.vocabulary.size,
            state_shardings=jax.tree.map(lambda x: x.sharding, state),
        )
        batch = put_batch(session.mesh, make_rows().batch(padded(1)))
        compiled = step.lower(state, [teacher.params], batch).compile()
        backend = session.backend
    return Run(session.config, session.mesh, session.vocabulary, teacher, state, compiled, backend)


def test_student_and_optimizer_are_split_over_fsdp_and_tensor(run):
    (state, _, _), _ = run.compiled.input_shardings
    new_state, _ = run.compiled.output_shardings
    assert not too_large(run.state, state, parts=4)
    assert not too_large(run.state, new_state, parts=4)
    # An array of 2 x 2 moments per parameter was looked at, and is not all there is.
    assert len(jax.tree.leaves(run.state)) > 3 * len(jax.tree.leaves(run.state.params)) - 1
    assert too_large(run.state, state, parts=8)


def test_teacher_is_split_as_the_config_says(run):
    (_, [teacher], _), _ = run.compiled.input_shardings
    parts = 8 if run.config.teacher.split_over_data else 4
    assert not too_large(run.teacher.params, teacher, parts)
    assert bool(too_large(run.teacher.params, teacher, 8)) == (parts == 4)


def test_sampler_weights_and_cache_are_split(run):
    """Its weights are gathered over fsdp on purpose; the cache is split by rows and heads."""
    with jax.set_mesh(run.mesh):
        run.backend.refit(run.state.params, 0)
        prompts = tuple(np.full(4, 3, np.int32) for _ in range(8))
        request = RolloutRequest(prompts, np.arange(8), SamplingParams(max_length=4))
        engine, weights = run.backend._engine, run.backend._weights.of(request)
        assert not held(weights, parts=2)
        engine.generate(weights, request)
        assert not held(engine.slots.cache, parts=8)
        engine.release()


def test_replicated_parameter_is_found(run):
    """What this file would not see, it could not forbid."""
    everywhere = jax.device_put(
        run.state.params["embedding"][...],
        jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec()),
    )
    assert held({"embedding": everywhere, "norm": jnp.ones(8)}, parts=2) == ["embedding"]
