"""What samples: the engine, and the backend that rollouts come from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distill.base.files import local_path
from distill.base.mesh import make_staging_mesh, receive_on_mesh
from distill.base.sharding import SAMPLER_RULES, AnyMesh, batch_parts, param_shardings
from distill.build.models import on_mesh
from distill.config.method import GenerateStrategy
from distill.config.policy import KNOWN_BACKENDS, OWN_LAYOUT, Policy
from distill.config.schema import Config
from distill.data.tokenizer import Vocabulary
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.models.lora import is_stored
from distill.models.model import Model
from distill.models.quantization import quantized, quantized_shapes
from distill.rollout.base import BackendParts, RolloutBackend, build_own_backend
from distill.rollout.environment import Dialogues
from distill.rollout.in_process import JaxBackend
from distill.rollout.remote import RemoteSampler, serve
from distill.rollout.vllm.backend import SECTION, VllmBackend
from distill.rollout.vllm.checks import check_sampler
from distill.rollout.vllm.client import read_api_key
from distill.rollout.vllm.probe import Probe
from distill.rollout.vllm.rows import is_tempered
from distill.rollout.vllm.server import OwnServer
from distill.rollout.vllm.weights import ServerExport, WeightsFolder
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig


def build_sampling_params(strategy: GenerateStrategy) -> SamplingParams:
    return SamplingParams(
        max_length=strategy.max_length,
        greedy=strategy.decoding_method == "greedy",
        temperature=strategy.temperature,
        top_k=strategy.top_k,
        top_p=strategy.top_p,
        min_p=strategy.min_p,
    )


def engine_sizes(policy: Policy) -> EngineConfig:
    generation = policy.generation
    return EngineConfig(
        max_length=policy.max_total_sequence_length,
        num_slots=generation.num_slots,
        cache_memory=generation.cache_memory * 1e9,
        int8=generation.cache_dtype == "int8",
    )


def build_engine(
    policy: Policy,
    graph: nnx.GraphDef,
    vocabulary: Vocabulary,
    *,
    few_programs: bool = False,
    records_routes: bool = False,
) -> Engine:
    """What samples from a model: rollouts, responses to held-out prompts, fixed data."""
    return Engine(
        graph,
        dataclasses.replace(
            engine_sizes(policy), few_programs=few_programs, records_routes=records_routes
        ),
        eos_ids=vocabulary.end_ids,
        pad_id=vocabulary.pad_id,
        vocab_size=vocabulary.size,
    )


def sampler_weights(policy: Policy, student: Model, mesh: AnyMesh) -> nnx.State:
    """Shapes and layouts of what a refit gives; the student may be shapes.

    Raises:
      UserError: the mesh does not divide the model.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, policy.precision),
        student.params,
        is_leaf=is_stored,
    )
    placed = on_mesh(shapes, param_shardings(shapes, mesh, SAMPLER_RULES, OWN_LAYOUT))
    if policy.generation.precision == "auto":
        return placed
    return quantized_shapes(_facts(student), placed)


def _facts(student: Model) -> ModelConfig:
    return nnx.merge(student.graph, student.params).config


def _build_in_process(
    policy: Policy, student: Model, vocabulary: Vocabulary, place: Mesh, mesh: Mesh
) -> JaxBackend:
    """Samples on `mesh`, for which weights are laid out on `place`."""
    in_8_bits = policy.generation.precision == "int8"
    return JaxBackend(
        build_engine(policy, student.graph, vocabulary, records_routes=policy.records_routes),
        dtype=jnp.dtype(policy.precision),
        shardings=jax.tree.map(lambda x: x.sharding, sampler_weights(policy, student, place)),
        finish=functools.partial(quantized, _facts(student)) if in_8_bits else None,
        mesh=mesh,
        keep_cache=not policy.generation.colocated.enabled,
        num_held=policy.generation.num_held,
    )


def serve_trainer(
    policy: Policy,
    student: Model,
    vocabulary: Vocabulary,
    mesh: Mesh,
    sampler_mesh: Mesh,
    begin_dialogues: Callable[[np.ndarray], Dialogues] | None,
) -> None:
    """Samples, as a process that does nothing else, until the others' run has ended.

    Of the student, only the shapes are here.
    """
    backend = _build_in_process(policy, student, vocabulary, sampler_mesh, sampler_mesh)
    shapes = sampler_weights(policy, student, sampler_mesh)
    receive = functools.partial(receive_on_mesh, shapes, make_staging_mesh(mesh, sampler_mesh))
    serve(backend, receive, begin_dialogues, refits_meanwhile=policy.generation.num_held > 1)


def build_backend(
    config: Config,
    student: Model,
    vocabulary: Vocabulary,
    mesh: Mesh,
    sampler_mesh: Mesh,
    *,
    student_folder: Path,
    workdir: Path,
) -> RolloutBackend:
    """What samples the student's responses; its parameters may be shapes on the trainer's mesh."""
    # With lambda_=0 nothing is sampled: no server is asked for anything.
    policy = config.policy
    if policy.generation.backend == "vllm" and config.distillation.lambda_ > 0:
        params = build_sampling_params(config.distillation.generate_strategy)
        return _build_on_servers(policy, student, params, vocabulary, mesh, student_folder, workdir)

    def build_in_process() -> RolloutBackend:
        # One program casts and lays out; devices that are not the trainer's then get copies.
        colocated = policy.generation.colocated
        place = sampler_mesh if colocated.enabled else make_staging_mesh(mesh, sampler_mesh)
        backend = _build_in_process(policy, student, vocabulary, place, sampler_mesh)
        return RemoteSampler(backend, sampler_mesh) if colocated.whole_processes else backend

    if policy.generation.backend in KNOWN_BACKENDS:
        return build_in_process()
    parts = BackendParts(
        graph=student.graph,
        tokenizer=vocabulary.tokenizer,
        vocab_size=vocabulary.size,
        end_ids=vocabulary.end_ids,
        student_folder=student_folder,
        workdir=workdir,
        build_in_process=build_in_process,
    )
    return build_own_backend(policy.generation.backend, parts, config.plugin)


def _build_on_servers(
    policy: Policy,
    student: Model,
    params: SamplingParams,
    vocabulary: Vocabulary,
    mesh: Mesh,
    student_folder: Path,
    workdir: Path,
) -> VllmBackend:
    """The student's sampler: servers that run, or one that will be started."""
    servers, max_length = policy.generation.vllm, policy.max_total_sequence_length
    folder = local_path(servers.weights_dir) if servers.weights_dir else workdir / "vllm"
    # A scored sequence is a prompt, after which one token is sampled.
    tempered = is_tempered(params, vocabulary.size)
    own = servers.python and OwnServer(
        servers.python,
        folder / "server.log",
        dtype=policy.precision,
        max_model_len=max_length + tempered,
        api_key=read_api_key(servers.api_key_variable, SECTION),
        extra_args=servers.server_args,
    )
    check = functools.partial(
        check_sampler,
        student=load_model_config(student_folder)[0],
        vocabulary=vocabulary,
        context=max_length + tempered,
        tempered=tempered,
    )
    probe = Probe(
        student.graph,
        vocab_size=vocabulary.size,
        max_length=max_length,
        row_multiple=batch_parts(mesh),
        max_gap=policy.generation.max_log_prob_gap,
        float32=policy.precision == "float32",
    )
    return VllmBackend(
        servers,
        own=own or None,
        check=check,
        weights=WeightsFolder(
            folder.absolute(),
            build_export(policy, student_folder, vocabulary),
            policy.generation.num_held,
        ),
        num_held=policy.generation.num_held,
        probe=probe,
        params=params,
        vocabulary=vocabulary,
        max_length=max_length,
    )


def build_export(policy: Policy, student_folder: Path, vocabulary: Vocabulary) -> ServerExport:
    """How the student is written for servers."""
    dtype = jnp.dtype(policy.precision)
    return ServerExport(student_folder, vocabulary, policy.max_total_sequence_length, dtype)
