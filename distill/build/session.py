"""One session: what a command sets up of a config, each part built when it is first asked for.

    with open_session(config, workdir) as session:
        student = session.load_frozen(session.student_folder, precision)
        session.evaluator(student, [each.model for each in session.load_teachers().values()])

Properties are built once and kept. What `load_...` returns is large and belongs to the caller, but
for the teachers, which the session keeps too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import optax
from jax.sharding import Mesh

from distill.base import processes
from distill.base.compilation import count_compiled_programs, keep_compiled_programs
from distill.base.errors import UserError
from distill.base.sharding import check_host_memory
from distill.base.status import busy
from distill.build.data import (
    build_dataset,
    build_validation,
    check_asked,
    teacher_prompts,
    template_arguments,
)
from distill.build.devices import build_mesh, build_sampler_mesh, in_all_processes
from distill.build.environment import MakeDialogues, build_dialogues
from distill.build.evaluator import build_evaluator
from distill.build.models import (
    abstract_model,
    abstract_state,
    build_model,
    check_router,
    first_state,
    frozen_options,
    load_student,
    student_options,
)
from distill.build.objective import build_objective, build_weighing
from distill.build.optimizer import optimizer_of
from distill.build.plugins import import_plugins
from distill.build.rewards import build_reward
from distill.build.sampler import build_backend, build_engine, serve_trainer
from distill.build.teachers import build_teachers
from distill.build.tokenizers import build_alignments, build_vocabulary
from distill.config.method import OF_STUDENT
from distill.config.schema import Config, all_teachers, ema_decay
from distill.data.base import DatasetInterface
from distill.data.prompts import Prompts
from distill.data.sequences import Sequences
from distill.data.tokenizer import Vocabulary
from distill.data.tokenizing import tokenize_prompts
from distill.evaluation.evaluator import Evaluator
from distill.evaluation.recorder import RolloutRecorder
from distill.losses.objective import Objective
from distill.models.checkpoints.hub import resolve_model
from distill.models.checkpoints.source import load_model_config
from distill.models.lora import merged
from distill.models.model import Model
from distill.rollout.base import RolloutBackend
from distill.rollout.remote import dismissing
from distill.run.checkpoint import Checkpoints
from distill.sampling.engine import Engine
from distill.step import TeacherInStep, TrainState
from distill.teachers.alignment import Alignment
from distill.teachers.base import Teacher


@contextlib.contextmanager
def open_session(
    config: Config,
    workdir: Path | None = None,
    *,
    trains: bool = True,
    before_serving: Callable[[], None] = lambda: None,
) -> Iterator[Session]:
    """A session on the devices that are here; whatever it has begun ends with the block.

    In processes that only sample, there is no block: they serve the others, and end with them.
    Unless it `trains`, no process only samples.

    Raises:
      UserError: a plugin cannot be imported, or batches cannot be split over the devices.
      SystemExit: this process only samples, and the others have done.
    """
    if jax.config.read("jax_enable_x64"):
        raise UserError(
            "JAX_ENABLE_X64 is on, and precisions are keys of the config (policy.precision): "
            "unset it"
        )
    import_plugins(config)
    keep_compiled_programs(config.compilation_cache)
    count_compiled_programs()
    session = Session(config if trains else in_all_processes(config), workdir)
    config = session.config
    whole = config.policy.generation.colocated.whole_processes
    if whole and processes.divide(len({x.process_index for x in session.mesh.devices.flat})):
        before_serving()
        _serve(Session(config, weights=False))
    sampler = dismissing() if whole else contextlib.nullcontext()
    with jax.set_mesh(session.mesh), session.cleanup, sampler:
        yield session


def _serve(session: Session) -> NoReturn:
    """Samples for the other processes until they have done."""
    config, meshes = session.config, (session.mesh, session.sampler_mesh)
    with session.cleanup:
        dialogues = session.dialogues(session.dataset) if config.environment.name else None
        serve_trainer(config.policy, session.student, session.vocabulary, *meshes, dialogues)
    raise SystemExit(0)


class Session:
    """Parts of a config that several commands need.

    Attributes:
      config: whose parts they are; without `weights`, those of hub models are not downloaded.
      cleanup: what ends with the session.
      teachers: by name, as loaded last.
    """

    def __init__(self, config: Config, workdir: Path | None = None, *, weights: bool = True):
        self.config, self._workdir, self._weights = config, workdir, weights
        self.cleanup = contextlib.ExitStack()
        self.teachers: dict[str, Teacher] = {"": Teacher()}

    @property
    def workdir(self) -> Path:
        """The run's folder, for commands that have opened the session with one."""
        assert self._workdir is not None
        return self._workdir

    # ------------------------------------------------------------------------------- devices

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The trainer's."""
        return build_mesh(self.config)

    @functools.cached_property
    def sampler_mesh(self) -> Mesh:
        """Where the jax backend samples."""
        return build_sampler_mesh(self.config.policy.generation, self.mesh)

    # ---------------------------------------------------------------------------------- data

    @functools.cached_property
    def student_folder(self) -> Path:
        return resolve_model(self.config.policy.model_name, weights=self._weights)

    @functools.cached_property
    def teacher_folders(self) -> dict[str, Path]:
        """By name, of the teachers of which a model is here."""
        return {
            name: self.student_folder
            if teacher.model in OF_STUDENT
            else resolve_model(teacher.model, weights=self._weights)
            for name, teacher in all_teachers(self.config).items()
            if teacher.model and not teacher.in_state
        }

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return build_vocabulary(self.config, self.student_folder, self.teacher_folders)

    @functools.cached_property
    def alignments(self) -> dict[str, Alignment]:
        """Of the teachers with another tokenizer, by name."""
        folders = self.student_folder, self.teacher_folders
        return build_alignments(self.config, self.vocabulary, *folders)

    @property
    def samples(self) -> bool:
        """Whether the student is sampled from; otherwise all batches are fixed data."""
        return self.config.distillation.lambda_ > 0

    @functools.cached_property
    def dataset(self) -> DatasetInterface:
        return build_dataset(self.config)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """What is trained on."""
        needs_responses = self.config.distillation.lambda_ < 1
        prompts = self.tokenize(self.dataset, needs_responses=needs_responses)
        check_asked(self.config, self.dataset, prompts)
        return prompts

    def tokenize(
        self,
        dataset: DatasetInterface,
        *,
        needs_responses: bool = False,
        max_prompt_length: int | None = None,
    ) -> Prompts:
        """Prompts of a length, by default one that leaves room for a whole response."""
        data, max_length = self.config.data, self.config.distillation.generate_strategy.max_length
        total = self.config.policy.max_total_sequence_length
        return tokenize_prompts(
            dataset,
            self.vocabulary.tokenizer,
            max_prompt_length=max_prompt_length or total - max_length,
            max_response_length=max_length,
            needs_responses=needs_responses,
            system_prompt=data.system_prompt,
            prompt_template=data.prompt_template,
            keep_truncated=data.keep_truncated,
            template_arguments=template_arguments(data),
            special_tokens=data.special_tokens,
            vocab_size=self.vocabulary.size,
            teachers=[*teacher_prompts(self.config, self.alignments).values()],
        )

    @functools.cached_property
    def reward(self) -> Callable[[Sequences], tuple[Sequences, dict[str, float]]]:
        """What the student's responses are worth, as columns."""
        arguments = self.config, self.dataset, self.prompts, self.vocabulary.tokenizer
        return build_reward(*arguments, self.cleanup)

    @functools.cached_property
    def weighing(self) -> Callable[[Sequences], Sequences]:
        """How much tokens count."""
        vocab = self.vocabulary.tokenizer.get_vocab()
        return build_weighing(self.config.distillation.objective, vocab)

    # -------------------------------------------------------------------------------- models

    @functools.cached_property
    def objective(self) -> Objective:
        return build_objective(self.config)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optimizer_of(self.config)

    @functools.cached_property
    def student(self) -> Model:
        """The graph, and the shapes of the parameters on the mesh: nothing is loaded."""
        folder, options = self.student_folder, student_options(self.config.policy)
        config = load_model_config(folder)[0]
        check_router(self.config.policy, config)
        return abstract_model(config, folder, self.mesh, **options)

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """What a checkpoint is restored to."""
        policy, config = self.config.policy, load_model_config(self.student_folder)[0]
        if policy.optimizer.offload == "host":
            check_host_memory(self.mesh, "policy.optimizer.offload")
        averages = ema_decay(self.config) > 0
        return abstract_state(self.student, config, self.optimizer, self.mesh, policy, averages)

    def load_state(self) -> TrainState:
        """The state before the first update."""
        shapes = self.state_shapes
        with busy("loading the student"):
            params = load_student(self.student_folder, self.mesh, self.config.policy)
            return first_state(params, self.optimizer, shapes, self.config.seed)

    def restore_state(self, checkpoints: Checkpoints, step: int) -> TrainState:
        """The state after `step` updates; what is frozen is loaded as at the beginning."""
        with busy(f"restoring step {step}"):
            state = checkpoints.restore(step, self.state_shapes.saved)
            if not self.config.policy.lora.rank:
                return state
            frozen = load_student(self.student_folder, self.mesh, self.config.policy)
            return dataclasses.replace(state, frozen=frozen)

    def evaluated(self, state: TrainState) -> Model:
        """The student as it is sampled from and scored: with its adapters merged."""
        return Model(self.student.graph, merged(state.params, self.config.policy.precision))

    def load_frozen(self, folder: Path, precision: str) -> Model:
        """A model that is not trained, stored in the precision in which it computes."""
        return build_model(folder, self.mesh, **frozen_options(self.config.policy, precision))

    def load_teachers(self, *, compares: bool = False, in_run: bool = False) -> dict[str, Teacher]:
        """The teachers by name, not yet started.

        Args:
          compares: whether those in 8 bits are compared with themselves in bfloat16.
          in_run: whether there is a train state, of which teachers may be a part.
        """
        with busy("loading the teacher"):
            self.teachers = build_teachers(
                self.config,
                self.teacher_folders,
                self.mesh,
                self.vocabulary,
                self.alignments,
                lambda: self.student,
                lambda: self.prompts,
                compares=compares,
                in_run=in_run,
            )
        return self.teachers

    @property
    def asked(self) -> list[tuple[Prompts, Alignment | None]]:
        """Of every teacher its prompts, and None if it has the student's tokenizer."""
        alignments = [self.alignments.get(name) for name in all_teachers(self.config)] or [None]
        return list(zip(self.prompts.by_teacher, alignments, strict=True))

    def teachers_in_step(self) -> list[TeacherInStep]:
        """Of every teacher, what the step is compiled for."""

        def one(name: str, teacher: Teacher) -> TeacherInStep:
            plain = TeacherInStep(teacher.graph, teacher.from_state, name)
            if (found := self.alignments.get(name)) is None:
                return plain
            return dataclasses.replace(plain, shared=found.shared, spans=found.spans)

        return [one(name, teacher) for name, teacher in self.teachers.items()]

    def weights_in_step(self) -> list[Any]:
        """Of every teacher, what the step takes.

        Of several that are in host memory, the step fetches the one that it is at.
        """
        models = {id(each.model): each.model for each in self.teachers.values() if each.model}
        hosted = [key for key, model in models.items() if model.on_devices is not None]
        fetched = {  # once, where several teachers are one model
            key: model.params if hosted[1:] and key in hosted else model.fetch()
            for key, model in models.items()
        }
        return [
            fetched[id(each.model)] if each.model else each.fetch()
            for each in self.teachers.values()
        ]

    def teachers_at(self, state: TrainState) -> list[Model | None]:
        """The models of the teachers as they are at a state; None for those not on the mesh."""
        return [teacher.at(state) for teacher in self.teachers.values()]

    # -------------------------------------------------------------------------------- sampler

    def build_engine(self, graph) -> Engine:
        """What samples from a model of this graph."""
        return build_engine(self.config.policy, graph, self.vocabulary)

    @functools.cached_property
    def backend(self) -> RolloutBackend:
        """What samples the student's responses: not started, and stopped with the session."""
        backend = build_backend(
            self.config,
            self.student,
            self.vocabulary,
            self.mesh,
            self.sampler_mesh,
            student_folder=self.student_folder,
            workdir=self.workdir,
        )
        self.cleanup.callback(backend.stop)
        return backend

    def dialogues(self, dataset: DatasetInterface) -> MakeDialogues | None:
        """Environments for rows of the dataset; None where a response is all there is."""
        return build_dialogues(self.config, self.vocabulary, dataset, self.cleanup)

    # ---------------------------------------------------------------------- held-out prompts

    @functools.cached_property
    def validation(self) -> DatasetInterface | None:
        """None where data.validation.max_samples is 0: then nothing is evaluated."""
        return build_validation(self.config)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        assert self.validation is not None  # or nothing is evaluated
        prompts = self.tokenize(self.validation)
        return build_evaluator(
            self.config,
            self.validation,
            prompts,
            self.vocabulary,
            self.alignments,
            objective=self.objective,
            mesh=self.mesh,
            dialogues=self.dialogues(self.validation),
        )

    def build_recorder(self) -> RolloutRecorder:
        """Writes what comes of the evaluation's responses, token by token."""
        assert self.validation is not None  # or nothing is evaluated
        prompts = self.evaluator.prompts
        return RolloutRecorder(self.workdir, self.validation, prompts, self.vocabulary)
