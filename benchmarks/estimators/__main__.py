"""What do estimators of a KL's gradient estimate, and how well? Judged by the exact gradient.

    python -m benchmarks.estimators [--config=CONFIG] [--responses=N] [--json=PATH] [--docs=NAME]

The built-in student responds to problems of the built-in task, and the built-in teacher reads the
responses. `bias` is the norm of the expected gradient less the exact one, and `noise` the standard
deviation of one sampled token's gradient, both in parts of the exact gradient's norm. Figures in
brackets are 95% intervals, by bootstrap over responses, or over groups of eight. Several minutes on
two CPU cores. Student, teacher and prompts may be those of another config. Of large models there
are the first tables alone: gradients by their parameters are too many to keep. `--docs=built_in`
and `--docs=smollm2` write the figures and the picture of docs/estimators.md.
"""

from __future__ import annotations

import jax
import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.estimators.estimators import all_estimators
from benchmarks.estimators.measure import (
    UNIT,
    Pair,
    Row,
    find_states,
    measure_batches,
    measure_spans,
    measure_states,
)
from benchmarks.estimators.report import NAMES, make_tables, write_docs
from configs import arithmetic
from distill.base.errors import UserError
from distill.build.session import open_session
from distill.config import cli
from distill.config.parse import parse_config
from distill.models.model import Model
from distill.sampling.choice import SamplingParams
from distill.sampling.request import RolloutRequest

SIZES = (8, 64, 512, 4096)
SPANS, PLACES = (1, 2), 16
MOST_PARAMETERS = 10**6
Found = dict[str, list[Row]]


def sample(config, responses: int) -> Pair:
    """Student, teacher and so many responses of the student, at temperature 1."""
    with open_session(parse_config(config)) as session:
        student = Model(session.student.graph, session.load_state().params)
        (teacher,) = session.load_teachers().values()
        if teacher.model is None:
            raise UserError("the exact gradient needs a teacher that is here")
        prompts = session.prompts
        rows = np.random.default_rng(0).permutation(len(prompts))[:responses]
        beginnings = prompts.sequences(rows)
        if prompts.response_tokens is not None:
            beginnings = beginnings.prompts()
        length = session.config.distillation.generate_strategy.max_length
        request = RolloutRequest(
            tuple(beginnings.split("tokens")),
            rows.astype(np.int64),
            SamplingParams(max_length=length),
        )
        rollout, _ = session.build_engine(student.graph).generate(student.params, request)
        sequences = rollout.sequences(beginnings)
        return Pair(student, teacher.model, sequences, session.vocabulary.size, prompts.pad_id)


def measure(pair: Pair) -> Found:
    """The rows of all tables."""
    estimators = all_estimators(pair.vocab_size)
    found = {"states": measure_states(find_states(pair), estimators)}
    if sum(x.size for x in jax.tree.leaves(pair.student.params)) <= MOST_PARAMETERS:
        some = [each for each in estimators if each.k in (0, 4)]
        found["batches"] = measure_batches(pair, some, SIZES)
        found["spans"] = measure_spans(pair, SPANS, PLACES)
    return found


def main() -> None:
    harness.check_json_path()
    if _RESPONSES.value % UNIT:
        raise UserError(f"--responses={_RESPONSES.value} is no multiple of {UNIT}")
    found = measure(sample(_CONFIG.value or arithmetic.get_config(), _RESPONSES.value))
    for name, table in make_tables(found).items():
        print(f"{name}\n\n{table}\n")
    harness.write_json([{"table": name, **row} for name, rows in found.items() for row in rows])
    if _DOCS.value:
        write_docs(found, _DOCS.value)


if __name__ == "__main__":
    _RESPONSES = flags.DEFINE_integer(
        "responses", 1024, "Responses of the student.", lower_bound=16
    )
    _CONFIG = cli.define_config_flag()
    _DOCS = flags.DEFINE_enum("docs", None, NAMES, "Which figures of docs/estimators.md to write.")
    cli.run(main)
