"""What benchmarks/sampling.py measures: the workload, and a builder for each implementation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness
from benchmarks.hf_config import hf_config_dict
from distill.base.errors import RunStopped
from distill.config.policy import Policy
from distill.models.cache import empty_cache
from distill.models.checkpoints.export import export_model
from distill.models.checkpoints.load import load_params
from distill.models.facts import ModelConfig
from distill.models.rope import Rope
from distill.models.transformer import Transformer
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

CPUS = 2
MEAN_LENGTH, MAX_LENGTH, LOG_SPREAD = 128, 512, 0.8
SHORTEST_PROMPT, LONGEST_PROMPT = 16, 128
SERVER_START_SECONDS = 600  # it compiles, too


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and what is asked of it."""

    title: str
    config: ModelConfig
    dtype: str
    num_prompts: int

    @property
    def name(self) -> str:
        return f"{self.title} {self.dtype}, {self.num_prompts} prompts"

    @property
    def prompts(self) -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(0)
        sizes = random.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1, self.num_prompts)
        return tuple(random.integers(0, self.config.vocab_size, n).astype(np.int32) for n in sizes)

    @property
    def lengths(self) -> np.ndarray:
        """Quantiles of the cut distribution, in random order: the same spread for any number."""
        levels = (np.arange(self.num_prompts) + 0.5) / self.num_prompts
        normal = np.array([statistics.NormalDist().inv_cdf(level) for level in levels])
        spread = np.exp(LOG_SPREAD * normal)
        scale = MEAN_LENGTH
        for _ in range(20):  # cutting takes from the mean
            lengths = np.clip(np.rint(scale * spread), 1, MAX_LENGTH).astype(np.int32)
            scale *= MEAN_LENGTH / lengths.mean()
        return np.random.default_rng(1).permutation(lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


SMALL_CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=12288,
    num_layers=8,
    model_width=384,
    num_heads=6,
    num_kv_heads=2,
    head_width=64,
    ffn_width=1280,
    tied=True,
    qkv_bias=True,
    qk_norm=None,
    rms_eps=1e-6,
    rope=Rope(1e6),
    max_positions=32768,
)
QWEN_CONFIG = dataclasses.replace(  # Qwen2.5-1.5B
    SMALL_CONFIG,
    vocab_size=151936,
    num_layers=28,
    model_width=1536,
    num_heads=12,
    num_kv_heads=2,
    head_width=128,
    ffn_width=8960,
)
CPU_WORKLOAD = Workload("Qwen2 20M", SMALL_CONFIG, "float32", 64)
GPU_WORKLOAD = Workload("Qwen2.5 1.5B", QWEN_CONFIG, "bfloat16", 256)


def bytes_read(
    prompts: Sequence[np.ndarray],
    lengths: np.ndarray,
    workload: Workload,
    slots: int,
    weight_bytes: int,
) -> int:
    """What decoding with so many slots must read at least; reading the prompts is not counted.

    An answer's first token comes with its prompt. Turn j after it reads the keys and values of the
    prompt and j tokens.
    """
    prompt_lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    row_turns = lengths.astype(np.int64) - 1
    turns = max(int(row_turns.max()), math.ceil(row_turns.sum() / slots))
    cached = int((row_turns * prompt_lengths + row_turns * (row_turns + 1) // 2).sum())
    sizes = 1, 1, 1, jnp.dtype(workload.dtype), False  # a token of one slot
    token = jax.eval_shape(lambda: empty_cache(workload.config, *sizes))
    token_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(token))
    return turns * weight_bytes + cached * token_bytes


# ------------------------------------------------------------------------------------- weights


@contextlib.contextmanager
def weights_folder(workload: Workload) -> Iterator[Path]:
    """Random weights as everyone reads them, for as long as they are needed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
        folder = Path(parent) / "model"
        export_weights(workload.config, workload.dtype, folder)
        yield folder


def export_weights(config: ModelConfig, dtype: str, folder: Path) -> None:
    """Writes random weights as a Hugging Face folder."""
    # In a process of its own: this one must not hold the device.
    process = multiprocessing.get_context("spawn").Process(
        target=_export, args=(config, dtype, folder)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RunStopped(f"writing the weights to {folder} failed: see above")


def _export(config: ModelConfig, dtype: str, folder: Path) -> None:
    _, params = load_weights(config, dtype, None)
    name = "tokenizer_config.json"  # which an export rewrites; nobody wants a tokenizer here
    no_tokenizer = types.SimpleNamespace(
        save_pretrained=lambda folder: (folder / name).write_text("{}")
    )
    hf_config = hf_config_dict(config, eos_token_id=None, pad_token_id=None)
    export_model(folder, params, config, hf_config, no_tokenizer, jnp.dtype(dtype))
    (folder / name).unlink()


def load_weights(
    config: ModelConfig, dtype: str, folder: Path | None, param_dtype: str | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and parameters, stored as they compute if nothing else is said.

    Those of a folder, or random ones made where they stay. What a backward pass recomputes is a
    run's default.
    """
    stored = jnp.dtype(param_dtype or dtype)
    remat = Policy().activation_checkpointing

    def make() -> Transformer:
        options = dict(dtype=jnp.dtype(dtype), param_dtype=stored, remat=remat)
        return Transformer(config, rngs=nnx.Rngs(0), **options)

    graphdef, abstract_params = nnx.split(nnx.eval_shape(make), nnx.Param)
    if folder is None:
        return graphdef, jax.jit(lambda: nnx.state(make(), nnx.Param))()
    return graphdef, load_params(folder, config, abstract_params, None, stored)


# ------------------------------------------------------------------------------------- the runs


def build_static(workload: Workload, folder: Path):
    """The engine with a slot for every prompt, all rows as long as the longest."""
    lengths = np.full(workload.num_prompts, MAX_LENGTH, np.int32)
    return _build_engine(workload, folder, workload.num_prompts, lengths)


def build_engine(workload: Workload, folder: Path, slots: int):
    return _build_engine(workload, folder, slots, workload.lengths)


def _build_engine(workload: Workload, folder: Path, slots: int, lengths: np.ndarray):
    graphdef, params = load_weights(workload.config, workload.dtype, folder)
    config = EngineConfig(max_length=LONGEST_PROMPT + MAX_LENGTH, num_slots=slots)
    facts = dict(eos_ids=(), pad_id=0, vocab_size=workload.config.vocab_size)
    engine = Engine(graphdef, config, **facts)
    request = RolloutRequest(
        workload.prompts,
        np.arange(workload.num_prompts),
        SamplingParams(max_length=MAX_LENGTH),
        max_lengths=lengths,
    )

    def run():
        rollout, _ = engine.generate(params, request)  # on the host
        _check_lengths(rollout.lengths_b, lengths)

    return run


def _left_padded(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one array, and their lengths."""
    prompts_bp = np.zeros((workload.num_prompts, LONGEST_PROMPT), np.int32)
    for row, prompt in zip(prompts_bp, workload.prompts, strict=True):
        row[-len(prompt) :] = prompt
    return prompts_bp, np.array([len(prompt) for prompt in workload.prompts], np.int32)


def _check_lengths(lengths, asked) -> None:
    if list(lengths) != list(asked):
        raise RuntimeError("responses have other lengths than were asked for")


# The cache of transformers: how it is asked for, and whether the decode step is compiled.
TRANSFORMERS_CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static compiled": {"cache_implementation": "static"},
}


def build_transformers(workload: Workload, folder: Path, cache: str):
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, workload.dtype))
    model = model.to(device).eval()
    prompts_bp, prompt_lengths_b = _left_padded(workload)
    given_bp = np.arange(LONGEST_PROMPT) >= LONGEST_PROMPT - prompt_lengths_b[:, None]
    inputs = {
        "input_ids": torch.from_numpy(prompts_bp.astype(np.int64)).to(device),
        "attention_mask": torch.from_numpy(given_bp.astype(np.int64)).to(device),
    }
    options = dict(TRANSFORMERS_CACHES[cache])
    if "compiled" in cache:
        options["compile_config"] = CompileConfig()
        options["compile_config"]._compile_all_devices = True  # by itself, not on a CPU
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_LENGTH,
        pad_token_id=0,
        **options,
    )

    def run():
        tokens_bt = model.generate(**inputs, generation_config=settings).cpu()
        if tokens_bt.shape != (workload.num_prompts, LONGEST_PROMPT + MAX_LENGTH):
            raise RuntimeError(f"transformers returned an array of shape {tokens_bt.shape}")

    return run


# Further arguments of the server.
VLLM_MODES = {"compiled": (), "eager": ("--enforce-eager",)}


def build_vllm(workload: Workload, folder: Path, python: str, arguments: tuple[str, ...]):
    from distill.rollout.vllm.checks import await_up
    from distill.rollout.vllm.client import VllmClient
    from distill.rollout.vllm.server import OwnServer

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    server = OwnServer(
        python,
        folder.with_name(f"vllm-{os.getpid()}.log"),
        dtype=workload.dtype,
        max_model_len=LONGEST_PROMPT + MAX_LENGTH,
        api_key="",
        extra_args=(
            "--skip-tokenizer-init",
            "--return-tokens-as-token-ids",
            "--no-enable-prefix-caching",
            *arguments,
        ),
    )
    server.check()
    client = VllmClient(server.launch(folder), server.api_key, check_running=server.check_running)
    await_up(client, SERVER_START_SECONDS, f"see {server.log}")
    pool = ThreadPoolExecutor(workload.num_prompts)
    prompts = [prompt.tolist() for prompt in workload.prompts]
    lengths = workload.lengths.tolist()

    def answer(prompt: list[int], length: int):
        return client.complete(prompt, max_tokens=length)

    def run():
        answers = list(pool.map(answer, prompts, lengths))
        _check_lengths([len(each.log_probs) for each in answers], lengths)
        server.check_running()  # also holds on to it: it ends with this process

    return run


def build_tunix(workload: Workload, folder: Path, python: str):
    """All rows as long as the longest, as it has no other way."""
    work = dict(
        prompts=[prompt.tolist() for prompt in workload.prompts],
        prompt_length=LONGEST_PROMPT,
        response_length=MAX_LENGTH,
        rope_theta=workload.config.rope.theta,
        end=workload.config.vocab_size,
    )
    script = Path(__file__).with_name("sampling_tunix.py")
    command = [python, str(script), str(folder), json.dumps(work)]
    ask, _ = harness.start_process(command, folder.with_name(f"tunix-{os.getpid()}.log"))

    def run():
        if int(ask()) != workload.num_prompts * MAX_LENGTH:
            raise RuntimeError("responses have other lengths than were asked for")

    return run
