"""The sampler on vLLM servers, and what they are started from."""

from __future__ import annotations

import functools
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from distill.base.files import local_path
from distill.base.sharding import batch_parts
from distill.config.policy import Policy
from distill.data.tokenizer import Vocabulary
from distill.models.checkpoints.source import load_model_config
from distill.models.model import Model
from distill.rollout.vllm import backend
from distill.rollout.vllm.checks import check_sampler
from distill.rollout.vllm.client import read_api_key
from distill.rollout.vllm.probe import Probe
from distill.rollout.vllm.rows import is_tempered
from distill.rollout.vllm.server import OwnServer
from distill.rollout.vllm.weights import ServerExport, WeightsFolder
from distill.sampling.choice import SamplingParams


def build_backend(
    policy: Policy,
    student: Model,
    params: SamplingParams,
    vocabulary: Vocabulary,
    mesh: Mesh,
    *,
    student_folder: Path,
    workdir: Path,
) -> backend.VllmBackend:
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
        api_key=read_api_key(servers.api_key_variable, backend.SECTION),
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
    return backend.VllmBackend(
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
