"""Several teachers: routed by the data, or with weights on the same tokens."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_test import (
    LAYOUTS,
    PAD,
    ROWS,
    VOCAB_SIZE,
    assert_same,
    make_model,
    make_rows,
    padded,
)
from tiny_runs import random_model, read_metrics, tiny_config, train_killed

import distill
from benchmarks.objectives import objective_of
from distill.base.errors import UserError
from distill.base.mesh import make_mesh
from distill.base.sharding import bytes_per_device, in_host_memory, param_shardings
from distill.batches.rows import make_batch
from distill.batches.source import Asked, BatchSource
from distill.build.devices import put_batch
from distill.build.session import Session
from distill.config.parse import parse_config
from distill.sampling.choice import SamplingParams
from distill.step import TeacherInStep, TrainState, make_train_step

OPTIMIZER = optax.sgd(1.0)  # the update is the gradient
FEW = {"microbatches": padded(4), "packed": LAYOUTS["packed into microbatches"]}
# Which of the rows each teacher is asked about, and its weight.
ROUTED = [(np.arange(ROWS) % 3 == 0, 1.0), (np.arange(ROWS) % 3 != 0, 1.0)]
SUMMED = [(np.ones(ROWS, bool), 0.25), (np.arange(ROWS) > 2, 2.0)]


@pytest.fixture(scope="module")
def student():
    return make_model(32, 1, 32, seed=1, num_kv_heads=4)


@pytest.fixture(scope="module")
def teachers():
    """Of two sizes; the second reads prompts of its own."""
    sizes = ((64, 40, 2), (48, 32, 3))
    return [make_model(w, 1, v, seed=s, tied=False, num_kv_heads=4) for w, v, s in sizes]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    prompts = tuple(rng.integers(1, VOCAB_SIZE, 4).astype(np.int32) for _ in range(ROWS))
    return dataclasses.replace(make_rows(), view_prompts=prompts)


def make_step(student, teachers):
    named = [
        TeacherInStep(graph, name=name) for name, (graph, _) in zip("ab", teachers, strict=False)
    ]
    objective = objective_of("forward")
    return make_train_step(student[0], named, objective, OPTIMIZER, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def steps(student, teachers):
    """Of both teachers, and of each alone."""
    return [make_step(student, each) for each in (teachers, teachers[:1], teachers[1:])]


def first_state(student):
    params = jax.tree.map(jnp.copy, student[1])
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))


class Fixed:
    """Always the same sequences."""

    def __init__(self, sequences):
        self._sequences = sequences.with_columns(row=np.arange(ROWS))

    def get_state(self):
        return {}

    def __next__(self):
        return self._sequences


def several(rows, layout, asked):
    """The batch of both teachers, as a run makes it."""

    def view(sequences):
        return rows.view.take(sequences["row"])

    (about_a, weight_a), (about_b, weight_b) = asked
    views = dataclasses.replace(layout, view_excess=8)
    source = BatchSource(
        Fixed(rows.sequences), None, lambda batch: batch,
        teachers=[
            Asked(layout, about=lambda s: about_a[s["row"]], weight=weight_a),
            Asked(views, about=lambda s: about_b[s["row"]], weight=weight_b, view=view),
        ],
        params=SamplingParams(max_length=9), num_generations=1, seed=0, lambda_=0.0,
        pad_id=PAD,
    )  # fmt: skip
    batch, _ = source.next(0, None)
    source.close()
    return batch


@pytest.fixture(scope="module")
def slow(student, teachers, rows, steps):
    """By definition: sums of what each teacher alone does, over the tokens counted once."""

    def define(asked):
        total = int(rows.rollout.lengths_b.sum())
        loss, gradient, shares = 0.0, jax.tree.map(jnp.zeros_like, student[1]), []
        for number, (about_b, weight) in enumerate(asked):
            some = np.flatnonzero(about_b)
            layout = dataclasses.replace(padded(1), view_excess=8 * number)
            view = rows.view.take(some) if number else None
            batch = make_batch(
                rows.sequences.take(some), layout=layout, pad_id=PAD, view=view, most=ROWS
            )
            new, metrics = steps[1 + number](first_state(student), [teachers[number][1]], batch)
            share = float(metrics["tokens"]) / total
            shares.append(share)
            loss += weight * share * float(metrics["loss"])
            gradient = jax.tree.map(
                lambda g, old, new, by=weight * share: g + by * (old - new),
                gradient, student[1], new.params,
            )  # fmt: skip
        return loss, jax.tree.map(jnp.subtract, student[1], gradient), shares, total

    return define


@pytest.mark.parametrize("asked", [ROUTED, SUMMED], ids=["routed", "summed"])
@pytest.mark.parametrize("name", [*FEW, "mesh"])
def test_update_is_the_sum_of_each_teachers(student, teachers, rows, steps, slow, name, asked):
    """Whatever the microbatches, the packing and the mesh."""
    loss, params, shares, total = slow(asked)
    batch, mesh = several(rows, FEW.get(name, padded(1)), asked), None
    state, weights = first_state(student), [params for _, params in teachers]
    if name == "mesh":
        mesh = make_mesh(2, 2, 2)
        batch = put_batch(mesh, batch)
        state = dataclasses.replace(
            state, trainable=jax.device_put(state.params, param_shardings(state.params, mesh))
        )
        weights = [jax.device_put(each, param_shardings(each, mesh)) for each in weights]
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        state, metrics = steps[0](state, weights, batch)
    assert_same(jax.device_get(state.params), jax.device_get(params))
    found = {key: float(value) for key, value in metrics.items()}
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["tokens"] == total
    assert [found[f"teacher/{n}/share"] for n in "ab"] == pytest.approx(shares)
    parts = [found[f"teacher/{n}/share"] * found[f"teacher/{n}/loss"] for n in "ab"]
    assert sum(parts) == pytest.approx(loss, rel=1e-5) and min(parts) > 0
    assert found["response_length"] == pytest.approx(total / ROWS)


def test_of_teachers_in_host_memory_the_step_fetches_one_at_a_time(student, teachers, rows, steps):
    """With the same update, to the bit: here a branch copies what the loop behind it reads."""
    batch = several(rows, padded(4), ROUTED)
    weights = [params for _, params in teachers]
    hosted = jax.tree.map(in_host_memory, weights)
    expected, _ = steps[0](first_state(student), weights, batch)
    found, _ = steps[0](first_state(student), hosted, batch)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    step = jax.make_jaxpr(steps[0])(first_state(student), hosted, batch).eqns[-1].params["jaxpr"]
    copies = [(each.primitive.name, str(each).count("device_put[")) for each in step.eqns]
    copies = [each for each in copies if each[1]]
    assert [name for name, _ in copies] == ["cond", "cond"], "each in a branch of its own"
    assert sum(number for _, number in copies) == len(jax.tree.leaves(hosted))


def test_a_second_teacher_takes_the_memory_of_its_weights(student, teachers, rows):
    """Temporaries are those of the larger, and no microbatch is computed for both."""

    def memory(number):
        step = make_step(student, teachers[:number])
        batch = several(rows, padded(4), ROUTED)
        batch = tuple(part for part in batch if part.teacher < number)
        weights = [params for _, params in teachers[:number]]
        compiled = step.lower(first_state(student), weights, batch).compile()
        return compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(batch))

    (one, of_one), (two, of_two) = memory(1), memory(2)
    added = two.argument_size_in_bytes - one.argument_size_in_bytes - (of_two - of_one)
    assert added == pytest.approx(bytes_per_device(teachers[1][1]), rel=0.02)
    assert two.temp_size_in_bytes <= 1.1 * one.temp_size_in_bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [
        dict(prompt=f"{i % 7}{sign}{i % 5}", response="1=1", answer="1", kind=kind)
        for i in range(24)
        for sign, kind in (("+", "sum"), ("-", "difference"))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def several_config(data, **teachers):
    config = tiny_config(max_steps=3, save_steps=2, eval_steps=2)
    config.data.update(name="jsonl", path=data, holdout_fraction=0.2)
    config.distillation.teacher_model_path, config.teacher.precision = "", "bfloat16"
    config.teachers = teachers
    return config


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (("kind=sum", "kind=difference", "kind=product"), "teachers.c.prompts=kind=product fits "),
        (
            ("kind=sum",),
            r"no teacher is asked about \d+ of \d+ prompts, the first of them \S+:.*dif",
        ),
        (("kin=sum",), "no column kin .wanted"),
    ],
)
def test_routes_that_lead_nowhere_are_told(data, rules, words):
    model = random_model(model_width=32, vocab_size=24, seed=1)
    teachers = {n: dict(model=model, prompts=r) for n, r in zip("abc", rules, strict=False)}
    if len(teachers) == 1:
        teachers["other"] = teachers["a"]
    with pytest.raises(UserError, match=words) as error:
        _ = Session(parse_config(several_config(data, **teachers))).prompts
    assert "\n" not in str(error.value)


def run_config(data):
    """Routed to a local teacher and to the student's average; all held to what the student was.

    The target moves by a schedule of its own.
    """
    config = several_config(
        data,
        sums=dict(
            model=random_model(model_width=32, vocab_size=24, seed=1),
            precision="float32",
            prompts="kind=sum",
            offload="host",
        ),
        own=dict(
            model="ema",
            ema_decay=0.75,
            prompts="kind=difference",
            prompt_template="{answer}={problem}",
        ),
        anchor=dict(model="start", precision="float32", weight=0.5, offload="host"),
    )
    config.distillation.max_steps = 4
    config.distillation.objective.update(target_start=0.4, target_pace=1.0)
    return config


def test_a_reference_needs_a_teacher_beside_it(data):
    model = random_model(model_width=32, vocab_size=24, seed=1)
    config = several_config(
        data,
        a=dict(model=model, weight=1.25, prompts="kind=sum"),
        reference=dict(model="start", weight=-0.25),
    )
    config.distillation.kl_type = "reverse"
    session = Session(parse_config(config))
    with pytest.raises(UserError, match="asked about .* are not above 0 in sum"):
        _ = session.prompts


def test_killed_run_resumes_to_the_same_bits(data, tmp_path, monkeypatch):
    whole = distill.train(run_config(data), tmp_path / "whole")
    train_killed(run_config(data), tmp_path / "killed", monkeypatch, step=3)
    again = distill.train(run_config(data), tmp_path / "killed")
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (whole.student / weights).read_bytes()
    assert again.results == whole.results
    lines = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed") == lines

    assert [*whole.results] == ["base", "teacher/sums", "teacher/anchor", "student"]
    base, student = whole.results["base"], whole.results["student"]
    assert abs(base["anchor/forward_kl"]) < 1e-6 < student["anchor/forward_kl"]
    assert whole.results["teacher/sums"]["forward_kl"] == 0 < student["sums/forward_kl"]
    shares = [line["target_share"] for line in lines if "target_share" in line]
    assert shares[0] == pytest.approx(0.4) and shares[-1] > 0.4 + 0.6 * 3 / 4 + 0.01
    step = next(line for line in lines if "loss" in line)
    shares = [step[f"teacher/{name}/share"] for name in ("sums", "own", "anchor")]
    assert shares[0] + shares[1] == pytest.approx(1) and shares[2] == 1
