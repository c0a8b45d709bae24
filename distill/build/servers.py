"""Builders of what runs on vLLM servers: the sampler and the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.sharding import Mesh

from distill.base.sharding import batch_parts
from distill.config.schema import Config, VllmServers
from distill.models.model import Model
from distill.rollout.vllm.backend import SECTION, Limits, VllmBackend
from distill.rollout.vllm.client import VllmClient, read_api_key
from distill.rollout.vllm.probe import Probe
from distill.rollout.vllm.rows import needs_scores
from distill.rollout.vllm.server import OwnServer
from distill.rollout.vllm.weights import ServerExport, WeightsFolder
from distill.sampling.choice import SamplingParams
from distill.teachers.server import VllmTeacher

if TYPE_CHECKING:
    from distill.build.data import Vocabulary


def build_backend(
    config: Config,
    student: Model,
    params: SamplingParams,
    vocabulary: Vocabulary,
    mesh: Mesh,
    *,
    student_folder: Path,
    workdir: Path,
) -> VllmBackend:
    """The student's sampler: servers that run, or one that will be started."""
    policy, servers = config.policy, config.policy.generation.vllm
    folder = Path(servers.weights_dir).expanduser() if servers.weights_dir else workdir / "vllm"
    export = build_export(config, student_folder, vocabulary)
    scored = needs_scores(params, vocabulary.size)
    own = servers.python and OwnServer(
        servers.python,
        folder / "server.log",
        dtype=policy.precision,
        max_model_len=policy.max_total_sequence_length + scored,
        api_key=read_api_key(servers.api_key_variable, SECTION),
        extra_args=servers.server_args,
    )
    return VllmBackend(
        build_clients(servers, SECTION),
        own=own or None,
        weights=WeightsFolder(folder.absolute(), export),
        probe=Probe(
            student.graph,
            vocab_size=vocabulary.size,
            max_length=policy.max_total_sequence_length,
            row_multiple=batch_parts(mesh),
            max_gap=policy.generation.max_log_prob_gap,
            float32=policy.precision == "float32",
        ),
        student_config=export.model_config,
        tokenizer=vocabulary.tokenizer,
        params=params,
        eos_ids=vocabulary.end_ids,
        pad_id=vocabulary.tokenizer.pad_token_id,
        vocab_size=vocabulary.size,
        max_length=policy.max_total_sequence_length,
        limits=Limits(servers.request_timeout, servers.retry_timeout, servers.start_timeout),
    )


def build_export(config: Config, student_folder: Path, vocabulary: Vocabulary) -> ServerExport:
    """How the student is written for servers; they may score, which takes one token more."""
    return ServerExport(
        student_folder,
        vocabulary.tokenizer,
        vocab_size=vocabulary.size,
        end_ids=vocabulary.end_ids,
        max_length=config.policy.max_total_sequence_length + 1,
        dtype=jnp.dtype(config.policy.precision),
    )


def build_remote_teacher(config: Config, vocabulary: Vocabulary) -> VllmTeacher | None:
    """The teacher behind servers; None for one on the mesh, and for hard labels."""
    if config.teacher.backend != "vllm" or config.distillation.hard_labels:
        return None
    servers = config.teacher.vllm
    return VllmTeacher(
        build_clients(servers, "teacher.vllm"),
        top_k=servers.top_k,
        tokenizer=vocabulary.tokenizer,
        vocab_size=vocabulary.size,
        max_length=config.policy.max_total_sequence_length,
        retry_timeout=servers.retry_timeout,
        start_timeout=servers.start_timeout,
    )


def build_clients(servers: VllmServers, section: str) -> list[VllmClient]:
    """One per URL.

    Raises:
      UserError: the API key's variable is not set.
    """
    key = read_api_key(servers.api_key_variable, section)
    return [VllmClient(url, key, servers.request_timeout) for url in servers.urls]
