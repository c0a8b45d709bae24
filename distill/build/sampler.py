"""What samples: the engine, and the backend that rollouts come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from distill.base.sharding import SAMPLER_RULES, param_shardings
from distill.build import servers as build_vllm
from distill.config.method import GenerateStrategy
from distill.config.policy import KNOWN_BACKENDS, Policy
from distill.config.schema import Config
from distill.data.tokenizer import Vocabulary
from distill.models.model import Model
from distill.rollout.base import BackendParts, RolloutBackend, build_own_backend
from distill.rollout.in_process import JaxBackend
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
    policy: Policy, graph: nnx.GraphDef, vocabulary: Vocabulary, *, few_programs: bool = False
) -> Engine:
    """What samples from a model: rollouts, responses to held-out prompts, fixed data."""
    return Engine(
        graph,
        dataclasses.replace(engine_sizes(policy), few_programs=few_programs),
        eos_ids=vocabulary.end_ids,
        pad_id=vocabulary.pad_id,
        vocab_size=vocabulary.size,
    )


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
        folders = dict(student_folder=student_folder, workdir=workdir)
        return build_vllm.build_backend(config.policy, student, params, vocabulary, mesh, **folders)

    def build_in_process() -> JaxBackend:
        return JaxBackend(
            build_engine(policy, student.graph, vocabulary),
            dtype=jnp.dtype(policy.precision),
            shardings=param_shardings(student.params, mesh, SAMPLER_RULES),
            mesh=sampler_mesh,
            keep_cache=not policy.generation.colocated.enabled,
        )

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
