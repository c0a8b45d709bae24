"""What is planned: a config, the shapes of its models, and a mesh that it can be split over."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from jax.sharding import AbstractMesh

from distill.base.errors import UserError
from distill.base.mesh import make_abstract_mesh, mesh_sizes, row_mesh_sizes, sampler_mesh_sizes
from distill.base.sharding import batch_parts, round_up
from distill.build.devices import split_devices
from distill.build.models import check_router
from distill.config.method import OF_STUDENT, Teachers
from distill.config.policy import microbatch_values, rows_per_microbatch
from distill.config.schema import Config, all_teachers
from distill.data.tokenizer import load_tokenizer, vocabulary_size
from distill.models.checkpoints.hub import find_config, split_revision
from distill.models.checkpoints.source import read_text_config
from distill.models.facts import ModelConfig
from distill.models.published import Published, published


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a step goes through: `rows` of `prompt` and `response` tokens each, all full."""

    rows: int
    prompt: int
    response: int
    prompts: int  # distinct ones: each is prefilled once for all of its responses
    microbatches: int

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def total(self) -> int:
        return self.rows * self.length

    @property
    def responses(self) -> int:
        return self.rows * self.response


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is planned; hashable.

    Teachers are in the config's order, None where one is not on the mesh. Notes say where facts
    come from, and what had to be changed. The sampler's mesh comes from `fit_to_devices`: the
    trainer's where it has no devices of its own.
    """

    config: Config
    student: ModelConfig
    teachers: tuple[ModelConfig | None, ...]
    vocab_size: int
    notes: tuple[str, ...] = ()
    sampler_mesh: AbstractMesh | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the rows, what each teacher is asked about: those with rules, equal shares."""
        sections = all_teachers(self.config).values()
        routed = sum(bool(each.prompts) for each in sections)
        return tuple(1 / routed if each.prompts else 1.0 for each in sections)

    @property
    def times_asked(self) -> float:
        """How often a row is computed: once for each teacher that is asked about it."""
        return sum(self.shares) or 1.0

    @property
    def mesh(self) -> AbstractMesh:
        """The trainer's, once `fit_to_devices` has set its sizes."""
        return make_abstract_mesh(**vars(self.config.mesh))

    @property
    def samples(self) -> bool:
        """Whether the student samples on this mesh, or on a neighbouring one."""
        config = self.config
        return config.distillation.lambda_ > 0 and config.policy.generation.backend != "vllm"

    @property
    def samples_apart(self) -> bool:
        """Whether the sampler has its own devices."""
        return self.samples and not self.config.policy.generation.colocated.enabled

    @property
    def tokens(self) -> Tokens:
        policy, strategy = self.config.policy, self.config.distillation.generate_strategy
        rows, response = policy.train_global_batch_size, strategy.max_length
        parts = batch_parts(self.mesh)
        at_once = rows_per_microbatch(policy) // parts * parts
        return Tokens(
            rows=rows,
            prompt=policy.max_total_sequence_length - response,
            response=response,
            prompts=rows // strategy.num_generations,
            microbatches=-(-rows // at_once),
        )


def find_workload(config: Config) -> Workload:
    """Reads the models' shapes; downloads nothing.

    Raises:
      UserError: the shape of a model is unknown here, or a run would refuse it.
    """
    (student, vocab_size), *notes = _find(config.policy.model_name)
    check_router(config.policy, student)
    teachers: list[ModelConfig | None] = []
    for teacher in all_teachers(config).values():
        found = student if teacher.model in OF_STUDENT else None
        if found is None and teacher.backend == "local":
            (found, _), note = _find(teacher.model)
            notes.append(note)
        teachers.append(found)
    notes = list(dict.fromkeys(filter(None, notes)))
    return Workload(config, student, tuple(teachers), vocab_size, tuple(notes))


def _find(name: str) -> tuple[Published, str]:
    """A model's facts and ids in use, and a note where they are not from its own files."""
    path, known = find_config(name), published().get(split_revision(name)[0])
    if path is None:
        if known is None:
            raise UserError(
                f"the shape of {name} is not known here: pass a folder with its config.json, "
                f"download the model, or name one of {', '.join(published())}"
            )
        return known, f"{name} is not in the local cache: planned with its published shape"
    config = ModelConfig.from_hf(read_text_config(path), str(path))
    if known is not None:
        return Published(config, known.vocab_size), ""
    try:
        size = vocabulary_size(load_tokenizer(path.parent, "none"))
        return Published(config, min(size, config.vocab_size)), ""
    except UserError:
        note = f"{name} has no tokenizer: all {config.vocab_size} rows of its head are counted"
        return Published(config, config.vocab_size), note


def fit_to_devices(workload: Workload, count: int) -> Workload:
    """The workload with the mesh's sizes over `count` devices, and batches that it can split.

    Raises:
      UserError: the mesh does not match the number of devices.
    """
    config = workload.config
    trainers, samplers = split_devices(config.policy.generation, range(count))
    sizes = mesh_sizes(vars(config.mesh), len(trainers))
    mesh, sampler_mesh = (make_abstract_mesh(**x) for x in (sizes, row_mesh_sizes(sizes)))
    generation = config.policy.generation
    if workload.samples_apart or generation.has_own_layout:
        count = len(samplers or trainers)
        own = sampler_mesh_sizes(sizes, count, generation.tensor, generation.width)
        sampler_mesh = make_abstract_mesh(**own)
    config, notes = _with_batches(config, batch_parts(mesh))
    own = {name: sizes[name] for name in vars(config.mesh)}
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **own))
    return dataclasses.replace(
        workload, config=config, notes=workload.notes + notes, sampler_mesh=sampler_mesh
    )


def _with_batches(config: Config, parts: int) -> tuple[Config, tuple[str, ...]]:
    """Batches raised to what so many groups of devices can split; a run would have to be told."""
    policy = config.policy
    at_once, rows = rows_per_microbatch(policy), policy.train_global_batch_size
    if policy.cut_by_tokens:  # any number of rows is allowed, but devices should have some
        micro, rows = max(at_once, parts), max(rows, parts)
    else:
        micro = round_up(at_once, parts)
        rows = round_up(rows, micro)
    changes = {
        "policy.train_global_batch_size": rows,
        "evaluation.batch_size": round_up(config.evaluation.batch_size, parts),
    }
    if micro != at_once:
        changes = microbatch_values(policy, micro) | changes
    notes = []
    for key, new in changes.items():
        if (old := operator.attrgetter(key)(config)) != new:
            notes.append(
                f"{key}={old} cannot be split {parts} ways: planned with {new}, as with "
                f"--config.{key}={new}"
            )
    return with_values(config, changes), tuple(notes)


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """The config with other values of some keys, named as on the command line."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    first, *rest = names
    if isinstance(section, Teachers):
        return Teachers(section | {first: _replaced(section[first], rest, value)})
    inner = _replaced(getattr(section, first), rest, value) if rest else value
    return dataclasses.replace(section, **{first: inner})
