"""What a student says to held-out prompts, read with the teacher, token by token."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from benchmarks.evidence.report import Row
from distill.batches.rows import teacher_hidden
from distill.build.session import Session
from distill.config.parse import parse_config
from distill.evaluation.evaluator import decode_responses
from distill.evaluation.rows import of_responses, rows_of
from distill.models.model import Model
from distill.sampling.choice import SamplingParams
from distill.sampling.request import Rollout

# A response loops if the same four tokens come three times; the teacher finds a token absurd to
# which it gives less than this probability.
LOOP, TIMES, ABSURD = 4, 3, 1e-4
OWN, TEACHERS = "own", "teachers"  # whose responses are read
SHOWN = 3  # responses kept as texts


class Reader:
    """Reads sampled responses to the prompts of data.validation with students and their teacher."""

    def __init__(self, config: ConfigDict):
        self._session = Session(parse_config(config))
        self._teacher = self._load(Path(config.distillation.teacher_model_path))
        self._responses = self._sample(self._teacher)

    def measure(self, folder: Path) -> Row:
        """What is measured of a student on its own samples and on the teacher's."""
        student = self._load(folder)
        own = self._sample(student)
        tokenizer = self._session.evaluator.vocabulary.tokenizer
        return {
            OWN: self._read(student, own),
            TEACHERS: self._read(student, self._responses),
            "texts": decode_responses(tokenizer, own)[:SHOWN],
        }

    def _load(self, folder: Path) -> Model:
        with jax.set_mesh(self._session.mesh):
            return self._session.load_frozen(folder, "float32")

    def _sample(self, model: Model) -> Rollout:
        length = self._session.config.distillation.generate_strategy.max_length
        sampling = SamplingParams(max_length=length)
        with jax.set_mesh(self._session.mesh):
            return self._session.evaluator.respond(model.graph, model.fetch(), sampling)

    def _read(self, student: Model, rollout: Rollout) -> dict[str, list]:
        """Of every response: tokens, sums over them, whether it was cut, and whether it loops."""
        texts = [t[:n].tolist() for t, n in zip(rollout.tokens_br, rollout.lengths_b, strict=True)]
        made: dict[str, list] = dict(
            tokens=[len(tokens) for tokens in texts],
            cut=(~rollout.stopped_b).astype(int).tolist(),
            loops=[int(loops(tokens)) for tokens in texts],
        )
        models = student.graph, student.fetch(), self._teacher.graph, self._teacher.fetch()
        width, prompts = rollout.tokens_br.shape[1], self._session.evaluator.prompts
        size = self._session.config.evaluation.batch_size
        with jax.set_mesh(self._session.mesh):
            read = [_read(*models, rows, width) for rows in rows_of(prompts, rollout, size)]
        is_token_br = np.arange(width) < rollout.lengths_b[:, None]
        for name in read[0]:
            values_br = np.concatenate([of[name] for of in read])[: len(texts)]
            sums_b = values_br.sum(axis=1, where=is_token_br, dtype=float)
            made[name] = sums_b.round(3).tolist()
        return made


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def _read(graph, params, teacher_graph, teacher_params, rows, width) -> dict[str, jax.Array]:
    """Of the responses' tokens (b, r): both KLs, and whether the teacher finds them absurd.

    All at once, from whole distributions: a batch of short responses has few of them.
    """
    student, teacher = nnx.merge(graph, params), nnx.merge(teacher_graph, teacher_params)
    log_q_brv, log_p_brv = (
        jax.nn.log_softmax(model.head().logits(of_responses(rows, hidden_btd, width)))
        for model, hidden_btd in (
            (student, student(rows.tokens_bt)),
            (teacher, teacher_hidden(teacher, rows)),
        )
    )
    targets_br1 = of_responses(rows, rows.targets_bt, width)[..., None]
    own_br = jnp.take_along_axis(log_p_brv, targets_br1, axis=-1)[..., 0]
    return dict(
        forward=(jnp.exp(log_p_brv) * (log_p_brv - log_q_brv)).sum(axis=-1),
        reverse=(jnp.exp(log_q_brv) * (log_q_brv - log_p_brv)).sum(axis=-1),
        absurd=own_br < np.log(ABSURD),
    )


def loops(tokens: Sequence[int]) -> bool:
    """Whether the same four tokens come three times, wherever they are; they may overlap."""
    grams = zip(*(tokens[i:] for i in range(LOOP)), strict=False)
    return max(collections.Counter(grams).values(), default=0) >= TIMES
