"""Where the time of a config's steps goes, and how near each part is to what the machine can do.

    python -m benchmarks.profile_step --config=configs/arithmetic.py [--steps=10] [--json=PATH]

How to read it. Whole steps of a real run, after two that compile: a batch, sampled and laid out,
and the update. `ms` are medians. The update's parts are differences between programs that do more
and more of it with the same batch: forward passes, the loss, gradients, all. `rate` is the share of
the rate of one large matrix product, for the operations that the plan counts and the tokens that
were computed; `memory` that of one large copy, for the bytes that decoding cannot but read.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import harness
from distill.base.topology import topology_here
from distill.batches.rows import Batch, num_filled, teacher_hidden
from distill.build.run import build_batches
from distill.build.session import Session, open_session
from distill.config import cli
from distill.config.parse import parse_config
from distill.planning import costs
from distill.planning.estimate import Plan, estimate
from distill.planning.workload import find_workload, fit_to_devices
from distill.step import TrainState, make_loss
from distill.trainer import build_step

WARM_UP = 2

_CONFIG = cli.define_config_flag()
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps.", lower_bound=1)


def main() -> None:
    harness.check_json_path()
    config = parse_config(cli.required_config(_CONFIG))
    with tempfile.TemporaryDirectory() as folder, open_session(config, Path(folder)) as session:
        session.load_teachers(in_run=True)
        session.backend.start()
        with jax.set_mesh(session.mesh):
            rows = profile(session, _STEPS.value)
        session.backend.stop()
    harness.print_rows(rows)
    harness.write_json(rows)


def profile(session: Session, steps: int) -> list[harness.Row]:
    """A row for each part of a step."""
    state, batches = session.load_state(), build_batches(session)
    programs = update_programs(session)
    seconds: dict[str, list[float]] = {}
    computed = []
    try:
        for number in range(WARM_UP + steps):
            measured, batch, state = _step(session, number, state, batches, programs)
            if number >= WARM_UP:
                for part, spent in measured.items():
                    seconds.setdefault(part, []).append(spent)
                computed.append(_computed_tokens(batch))
    finally:
        batches.close()
    medians = {part: statistics.median(each) for part, each in seconds.items()}
    made = _plan(session)
    return _rows(medians, made, statistics.mean(computed) / made.workload.tokens.total)


def _step(session: Session, number: int, state: TrainState, batches, programs):
    start = time.perf_counter()
    batch, measured = batches.next(number, state.params)
    jax.block_until_ready(batch)
    whole = time.perf_counter() - start
    sampled = {name: measured.get(f"generation/{name}", 0.0) for name in _OF_SAMPLING}
    parts = {
        "sampling: prefill": sampled["prefill_seconds"],
        "sampling: decoding": sampled["decode_seconds"],
        "sampling: the rest": sampled["seconds"]
        - sampled["prefill_seconds"]
        - sampled["decode_seconds"],
        "refit": sampled["refit_seconds"],
        "batch: data, rows, placing": whole - sampled["seconds"] - sampled["refit_seconds"],
    }
    teachers, last = session.weights_in_step(), 0.0
    for name, program in programs.items():
        spent, result = _timed(lambda program=program: program(state, teachers, batch))
        parts[f"update: {name}"], last = max(spent - last, 0.0), spent
    state, _ = result
    return parts, batch, state


_OF_SAMPLING = "prefill_seconds", "decode_seconds", "seconds", "refit_seconds"


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def update_programs(session: Session) -> dict[str, Callable]:
    """Programs of (state, teachers' parameters, batch), each with one part more than the last."""
    student, teachers = session.student.graph, session.teachers_in_step()
    objective, vocab_size = session.objective, session.vocabulary.size
    if any(each.shared is not None or each.from_state for each in teachers):
        raise cli.UserError("the profile is of teachers with the student's tokenizer, loaded apart")
    losses = [make_loss(student, each.graph, objective, vocab_size=vocab_size) for each in teachers]

    def forward(params, teacher_params, rows, number):
        arrays = rows.tokens_bt, rows.positions_bt, rows.segment_ids_bt
        total = nnx.merge(student, params)(*arrays).sum(dtype=jnp.float32)
        if (graph := teachers[number].graph) is not None:
            hidden = teacher_hidden(nnx.merge(graph, teacher_params), rows)
            total += hidden.sum(dtype=jnp.float32)
        return total

    def loss(params, teacher_params, rows, number):
        return losses[number](params, teacher_params, rows, 1.0)[0]

    def gradients(params, *arguments):
        grads = jax.grad(loss)(params, *arguments)
        return sum(jnp.sum(x) for x in jax.tree.leaves(grads))

    def over_batch(evaluate):
        @jax.jit
        def program(state, teacher_params, batch):
            total = jnp.zeros(())
            for part in batch:
                one = functools.partial(lambda part, i: jax.tree.map(lambda x: x[i], part), part)
                params_t, number = teacher_params[part.teacher], part.teacher

                def add(i, total, one=one, params_t=params_t, number=number):
                    return total + evaluate(state.params, params_t, one(i), number)

                total = jax.lax.fori_loop(0, num_filled(part), add, total)
            return total

        return program

    return {
        "forward passes": over_batch(forward),
        "loss": over_batch(loss),
        "gradients": over_batch(gradients),
        "optimizer, and what is logged": build_step(session),
    }


def _computed_tokens(batch: Batch) -> float:
    return float(sum(int(num_filled(part)) * part.tokens_bt[0].size for part in batch))


def _plan(session: Session) -> Plan:
    topology = topology_here()
    return estimate(fit_to_devices(find_workload(session.config), topology.count), topology)


def product_rate(dtype: str) -> float:
    """Operations per second of the fastest of a few large matrix products on one device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    factor = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = [_timed(lambda: product(factor, factor))[0] for _ in range(8)]
    return 2 * size**3 / min(seconds)


def _rows(medians: dict[str, float], plan: Plan, computed: float) -> list[harness.Row]:
    """`computed`: tokens of a batch, padding counted, in parts of those of full rows."""
    rate, chip = product_rate(plan.workload.config.policy.precision), plan.topology.chip
    parts = costs.flops(plan.workload, plan.arrays)
    per_device = {name: count * computed / plan.workload.mesh.size for name, count in parts.items()}
    operations = {
        "update: forward passes": per_device["teacher"] + per_device["student"] / 3,
        "update: loss": per_device["loss"],
        "update: gradients": 2 / 3 * per_device["student"] + per_device["recomputation"],
    }
    moved = {phase.name: phase.moved for phase in plan.phases}.get("generation", 0.0)
    whole = sum(medians.values())

    def row(part: str, seconds: float, operations: float, moved: float) -> harness.Row:
        return {
            "part": part,
            "ms": 1000 * seconds,
            "share": seconds / whole,
            "rate": operations / seconds / rate if operations and seconds else None,
            "memory": moved / seconds / chip.bandwidth if moved and seconds else None,
        }

    rows = [
        row(
            part,
            seconds,
            operations.get(part, 0.0),
            moved * computed if part == "sampling: decoding" else 0.0,
        )
        for part, seconds in medians.items()
    ]
    of_update = [each for part, each in medians.items() if part.startswith("update")]
    updating = sum(per_device.values()) - per_device["generation"]
    rows.append(row("the whole update", sum(of_update), updating, 0.0))
    rows.append(row("the whole step", whole, sum(per_device.values()), 0.0))
    return rows


if __name__ == "__main__":
    cli.run(main)
