"""Writes fixed data: a model's responses as JSONL, and a teacher's scores of responses."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from distill.base import processes
from distill.base.errors import UserError
from distill.base.files import write_atomically
from distill.base.sharding import constrain_whole
from distill.base.status import busy, say
from distill.batches.rows import Rows, teacher_hidden
from distill.build.contents import find_inputs
from distill.build.devices import make_put
from distill.build.sampler import build_sampling_params
from distill.build.session import Session
from distill.build.teachers import identify_scores
from distill.config.changes import is_same_run
from distill.config.parse import to_flat_dict
from distill.config.schema import all_teachers, teacher_key
from distill.data.base import Example
from distill.data.chat import wrap_prompt
from distill.data.prompts import Prompts
from distill.data.scores import ScoreWriter, check_replaceable
from distill.data.sequences import Sequences
from distill.evaluation.evaluator import decode_responses
from distill.evaluation.rows import of_responses, padded_rows
from distill.models.model import Model
from distill.sampling.request import RolloutRequest

# At once: many more than there are slots, and little enough to be made again after a stop.
_RESPONSES_PER_REQUEST = 1024
_Made = tuple[int, int, dict[str, int]]  # prompts, bytes, and lines by what they are
_GENERATIONS = "distillation.generate_strategy.num_generations"


def write_responses(session: Session, output: Path, num_generations: int) -> dict[str, int]:
    """The student's responses to all prompts; see `distill.generate`."""
    config, dataset, vocabulary = session.config, session.dataset, session.vocabulary
    if name := config.environment.name:
        raise UserError(
            f"environment.name={name} makes dialogues, and generated data has single responses: "
            "set environment.name=''"
        )
    prompts = session.tokenize(dataset)
    say(f"data: {prompts.summary()}")
    flat = to_flat_dict(config) | {_GENERATIONS: num_generations}
    made = _Partial(output, dict(config=flat, contents=find_inputs(session)))
    with busy("loading the model"):
        model = session.load_frozen(session.student_folder, config.teacher.dtype)
    engine = session.build_engine(model.graph)
    params = build_sampling_params(config.distillation.generate_strategy)
    template = config.data.prompt_template or dataset.get_prompt_template()
    at_once = max(1, _RESPONSES_PER_REQUEST // num_generations)
    for start in range(made.prompts, len(prompts), at_once):
        tokens = tuple(prompts.prompt_tokens[start : start + at_once])
        index = np.arange(start, start + len(tokens))
        request = RolloutRequest(
            tokens, index, params, num_generations=num_generations, seed=config.seed
        )
        with busy(f"responding to prompts {start + 1} to {start + len(tokens)} of {len(prompts)}"):
            rollout, _ = engine.generate(model.params, request)
        texts = decode_responses(vocabulary.tokenizer, rollout)
        lines = []
        for row, (text, stopped) in enumerate(zip(texts, rollout.stopped_b.tolist(), strict=True)):
            example = dataset[int(prompts.rows[start + row // num_generations])]
            # A response may have been cut off within a character.
            cut = {} if stopped else {"response": text.rstrip("\ufffd"), "truncated": True}
            lines.append(_line(example, text, row % num_generations, template) | cut)
        made.add(lines, start + len(tokens))
    return made.finish()


def write_scores(session: Session, output: Path) -> int:
    """The teacher's scores of all responses of the data, whose tokens are returned.

    Of several teachers, each has a folder of its name in `output`, for those it is asked about.
    """
    if session.alignments:
        key = teacher_key([*session.alignments][0], "alignment")
        raise UserError(
            f"scores on disk are of the student's ids, and with {key} the teacher has others: "
            "leave out --scores"
        )
    folders = [output / name for name in all_teachers(session.config)]
    processes.from_first(functools.partial(check_replaceable, *folders))
    say(f"data: {session.prompts.summary()}")
    tokens = 0
    for name, prompts in zip(session.load_teachers(), session.prompts.by_teacher, strict=True):
        tokens += _write_scores_of(session, name, prompts, output / name)
    return tokens


def _write_scores_of(session: Session, name: str, prompts: Prompts, output: Path) -> int:
    """Of a teacher on the mesh, its hidden states; of one behind servers, its likeliest tokens.

    What was stopped goes on where it was.
    """
    config = session.config
    tokens = sum(len(response) for response in prompts.response_tokens or [])
    at_once = config.evaluation.batch_size
    folder = session.teacher_folders.get(name)
    writer = ScoreWriter(
        output, identify_scores(all_teachers(config)[name], folder, prompts), at_once
    )
    if writer.rows:
        say(f"going on behind {writer.rows} rows of {output}.partial")
    teacher = session.teachers[name]
    teacher.start()
    for start in range(writer.rows, len(prompts), at_once):
        sequences = prompts.sequences(np.arange(len(prompts))[start : start + at_once])
        seen = prompts.view(sequences) or sequences
        if teacher.model is not None:
            columns = {"teacher_hidden": _hidden(session, prompts, teacher.model, seen)}
        else:
            trained_n = seen["weight"] != 0
            columns = {name: values[trained_n] for name, values in teacher.score(seen).items()}
        if not start:
            size = sum(values[0].nbytes for values in columns.values())
            say(f"{tokens} tokens of {size} bytes each: {tokens * size / 1e9:.3g} GB")
        writer.add(columns)
    writer.finish()
    return tokens


def _hidden(session: Session, prompts: Prompts, teacher: Model, sequences: Sequences) -> np.ndarray:
    """From what the teacher predicts each trained token, (n, d)."""
    rows = session.config.evaluation.batch_size
    length = prompts.prompt_width + prompts.view_excess + prompts.response_width
    (host,) = padded_rows(sequences, rows, length, prompts.pad_id)
    placed = jax.tree.map(make_put(session.mesh), host)
    hidden_brd = jax.device_get(
        _hidden_of_responses(teacher.graph, teacher.fetch(), placed, prompts.response_width)
    )
    counts_b = [np.count_nonzero(weight_t) for weight_t in sequences.split("weight")]
    return np.concatenate([hidden_brd[i, :count] for i, count in enumerate(counts_b)])


@functools.partial(jax.jit, static_argnums=(0, 3))
def _hidden_of_responses(graph, params, rows: Rows, width: int) -> jax.Array:
    hidden_btd = teacher_hidden(nnx.merge(graph, params), rows)
    return constrain_whole(of_responses(rows, hidden_btd, width))


class _Partial:
    """The lines made so far, beside what they were made of: the same command goes on from there.

    Responses depend on seed and prompt alone, so those of a stopped command are the same rows.
    """

    def __init__(self, output: Path, identity: dict[str, Any]):
        self._output, self._identity = output, identity
        self._lines = output.with_name(output.name + ".partial")
        self._state = output.with_name(output.name + ".partial.json")
        saved: _Made | None = processes.from_first(self._read)
        self.prompts, self._size, self._counts = saved or (0, 0, {"written": 0, "truncated": 0})
        if processes.is_first():
            with self._lines.open("a") as file:
                file.truncate(self._size)
        if self.prompts:
            say(f"going on behind {self.prompts} prompts of {self._lines}")

    def _read(self) -> _Made | None:
        if not (self._lines.exists() and self._state.exists()):
            return None
        state = json.loads(self._state.read_text())
        if is_same_run(state["identity"], self._identity):
            return state["made"]
        say(f"starting over: {self._lines} was made with another config or other files")
        return None

    def add(self, lines: list[dict[str, Any]], prompts: int) -> None:
        """Keeps the lines of all prompts up to `prompts`."""
        self._counts["written"] += len(lines)
        self._counts["truncated"] += sum("truncated" in line for line in lines)
        self.prompts = prompts
        if processes.is_first():
            with self._lines.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
                self._size = file.tell()
            made = self.prompts, self._size, self._counts
            write_atomically(self._state, json.dumps(dict(identity=self._identity, made=made)))

    def finish(self) -> dict[str, int]:
        if processes.is_first():
            os.replace(self._lines, self._output)
            self._state.unlink(missing_ok=True)
        return self._counts


def _line(example: Example, response: str, generation: int, template: str) -> dict[str, Any]:
    # With the template's words: those who read the file need not know of it.
    prompt = wrap_prompt(example.prompt, template)
    line = {"id": f"{example.id}/{generation}", "prompt": prompt, "response": response}
    answer = {} if example.answer is None else {"answer": example.answer}
    return {**example.columns, **line, **answer}
