"""The teachers of a config: on the mesh, behind servers, by scores, or none for hard labels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from distill.base.errors import UserError
from distill.base.files import local_path
from distill.base.sharding import RULES, SPREAD_RULES, AnyMesh, check_host_memory
from distill.build.devices import make_put
from distill.build.models import abstract_model, build_head, build_model, frozen_options, head_only
from distill.config.method import OneTeacher
from distill.config.schema import Config, all_teachers, teacher_key
from distill.data.prompts import Prompts
from distill.data.scores import Scores
from distill.data.tokenizer import Vocabulary
from distill.evaluation.rows import padded_rows
from distill.models.checkpoints.fingerprint import fingerprint
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.models.model import Model
from distill.step import whole_params
from distill.teachers.alignment import Alignment
from distill.teachers.base import OwnTeacher, Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.local import Texts, abstract_stored, load_teacher
from distill.teachers.server import ServerTeacher

# What of the train state a teacher is that is the student.
FROM_STATE: dict[str, Callable[[Any], Any]] = {
    "self": lambda state: state.params,
    "ema": lambda state: whole_params(state.average, state.frozen),
    "start": lambda state: state.frozen,
}


def part_of_state(config: Config, section: OneTeacher) -> Callable[[Any], Any] | None:
    """What of the train state a teacher is; None: it has weights of its own.

    What the student was is the base of its adapters, if that is stored as the teacher would be.
    """
    if section.model != "start":
        return FROM_STATE.get(section.model)
    policy = config.policy
    base = policy.precision, "none", False, ""
    shared = policy.lora.rank and policy.lora.base_dtype == "auto" and section.storage == base
    return FROM_STATE["start"] if shared else None


def build_teachers(
    config: Config,
    folders: Mapping[str, Path],
    mesh: Mesh,
    vocabulary: Vocabulary,
    alignments: Mapping[str, Alignment],
    student: Callable[[], Model],
    prompts: Callable[[], Prompts],
    *,
    compares: bool = False,
    in_run: bool = False,
) -> dict[str, Teacher]:
    """The teachers by name, loaded from their folders if they are here, but not yet started.

    One that says nothing, for hard labels. Models that are stored alike are loaded once. With
    `compares`, those in 8 bits are compared with themselves in bfloat16, on the prompts that the
    student is trained on. `in_run` says whether there is a train state, of which teachers may be a
    part.

    Raises:
      UserError: the platform cannot offload, or a folder or scores are not as they should be.
    """
    loaded: dict[Any, Teacher] = {}

    def build(number: int, name: str, section: OneTeacher) -> Teacher:
        if section.scores:
            asked, path, head = prompts().by_teacher[number], local_path(section.scores), None
            identity = identify_scores(section, folders.get(name), asked)
            lengths_r = [len(tokens) for tokens in asked.response_tokens or []]
            scores = Scores(path, identity, lengths_r, teacher_key(name, "scores"))
            if section.backend == "local":
                head = build_head(folders[name], mesh, **teacher_options(config, section))
            return CachedTeacher(scores, asked.rows, head)
        if section.backend == "vllm":
            longest = config.policy.max_total_sequence_length
            vllm = teacher_key(name, "vllm")
            return ServerTeacher(section.vllm, vocabulary, longest, vllm)
        part = part_of_state(config, section)
        if part and (in_run or section.in_state):
            return OwnTeacher(student().graph, part, stays=not section.in_state)
        stored = folders[name], section.storage
        if stored not in loaded:
            compared_on, own = None, vocabulary
            if compares and section.precision == "int8":
                compared_on = prompts()
            if name in alignments:
                own, asked = alignments[name].teacher, prompts().by_teacher[number]
                _check_positions(config, name, folders[name], asked.view_excess)
                compared_on = compared_on and asked.of_view(own.pad_id)
            loaded[stored] = _load(config, name, section, folders, mesh, own, compared_on)
        return loaded[stored]

    sections = all_teachers(config).items()
    built = {name: build(number, name, each) for number, (name, each) in enumerate(sections)}
    return built or {"": Teacher()}


def _check_positions(config: Config, name: str, folder: Path, excess: int) -> None:
    """Whether a teacher with another tokenizer has room for what it cuts longer."""
    longest = config.policy.max_total_sequence_length + excess
    if longest > (most := load_model_config(folder)[0].max_positions):
        raise UserError(
            f"{teacher_key(name, 'alignment')} needs rows of up to {longest} of the teacher's own "
            f"tokens, and the model in {folder} has {most} positions: lower "
            "policy.max_total_sequence_length or distillation.generate_strategy.max_length"
        )


def _load(
    config: Config,
    name: str,
    section: OneTeacher,
    folders: Mapping[str, Path],
    mesh: Mesh,
    vocabulary: Vocabulary,
    compared_on: Prompts | None,
) -> Teacher:
    """A teacher from its folder."""
    if section.offload != "none":
        check_host_memory(mesh, teacher_key(name, "offload"))
    texts = None
    if compared_on is not None:
        size = config.evaluation.batch_size
        prompts = compared_on.sequences(np.arange(size) % len(compared_on)).prompts()
        (rows,) = padded_rows(prompts, size, compared_on.prompt_width, compared_on.pad_id)
        texts = Texts(*map(make_put(mesh), (rows.tokens_bt, rows.lengths_b)))
    folder = folders[name]
    return load_teacher(
        functools.partial(build_model, folder, mesh, **teacher_options(config, section)),
        load_model_config(folder)[0],
        precision=section.precision,
        offload=section.offload,
        compared_on=texts,
        vocab_size=vocabulary.size,
    )


def abstract_teacher(
    config: Config, section: OneTeacher, model_config: ModelConfig, mesh: AnyMesh
) -> Model:
    """Shapes of a teacher on the mesh, where the train step takes it from."""
    model = abstract_model(model_config, "the teacher", mesh, **teacher_options(config, section))
    if section.scores:
        return head_only(model)
    return abstract_stored(
        model, model_config, precision=section.precision, offload=section.offload
    )


def teacher_options(config: Config, section: OneTeacher) -> dict[str, Any]:
    """Of `abstract_model`."""
    rules = SPREAD_RULES if section.split_over_data else RULES
    return frozen_options(config.policy, section.dtype) | dict(rules=rules)


def identify_scores(teacher: OneTeacher, folder: Path | None, prompts: Prompts) -> dict[str, Any]:
    """What scores depend on, by what a message would call it."""
    by_kind: dict[str, Any] = {"teacher": teacher.model or "server"}
    if teacher.backend == "local":
        assert folder is not None
        by_kind = {"teacher": fingerprint(folder), "teacher.precision": teacher.precision}
    else:
        by_kind["teacher.vllm.top_k"] = teacher.vllm.top_k
    # The view's prompts by themselves: else nobody would know whose prompts are others.
    view = dataclasses.replace(
        prompts, rows=np.zeros(0), prompt_tokens=prompts.view_tokens or [], response_tokens=None
    )
    data, view = (dataclasses.replace(each, view_tokens=None) for each in (prompts, view))
    return by_kind | {"data": data.digest()[:12], "view": view.digest()[:12]}
