"""Time to sample one batch of rollouts: our engine, our static batch, transformers, vLLM.

    python -m benchmarks.sampling [--json=PATH] [--repeats=N] [--only=TEXT] [--vllm_python=PATH]

How to read it. Everyone has the same random weights, prompts and forced response lengths; nothing
ends an answer early, temperature is 1, nothing is truncated. Lengths are spread like those of real
answers: lognormal, mean 128, maximum 512. `tokens per second` counts only tokens that were asked
for: a static batch decodes every row until the longest ends. `slots` are the rows decoded at once,
`-` where the implementation decides. `ratio` is the part of our static batch's time: below 1 is
better. `seconds` is a median of interleaved repeats, after two runs that compile and warm up;
`peak_bytes` is what a run adds to the weights, nothing for an engine that keeps its cache.

Log-probabilities of the sampled tokens are part of ours and of vLLM's work, not of transformers'.
vLLM is a server on loopback, its cache of prompts off: repeats would find theirs there.

On a CPU: a Qwen2 of 20M parameters in float32, 64 prompts, the first two CPUs for everyone. On a
GPU: Qwen2.5-1.5B's shape in bfloat16, 256 prompts, and `of bound`: the time that it takes to read
what must be read (weights every turn, the cache of every answer) at the bandwidth of a copy made in
the same run, over the time measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import multiprocessing
import os
import statistics
import tempfile
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import harness
from distill import cli
from distill.errors import RunStopped
from distill.models.config import ModelConfig
from distill.models.hf import export_model, hf_config_dict, load_params
from distill.models.transformer import Transformer
from distill.sampling.cache import bytes_per_token
from distill.sampling.choice import SamplingParams, row_keys
from distill.sampling.decode import make_generate
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

BASELINE, COPY = "static batch", "copy"
CPUS = 2
MEAN_LENGTH, MAX_LENGTH, LOG_SPREAD = 128, 512, 0.8
SHORTEST_PROMPT, LONGEST_PROMPT = 16, 128
COPIED_BYTES = 1 << 30
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
    qk_norm=False,
    rms_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
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

_ONLY = flags.DEFINE_string("only", "", "Only implementations whose name contains this.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)
_VLLM_PYTHON = flags.DEFINE_string("vllm_python", None, "Python interpreter that has vLLM.")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An implementation, and how many rows it decodes at once if that is ours to say."""

    job: harness.Job
    slots: int | None = None


def main() -> None:
    harness.check_json_path()
    platform = harness.select_platform()
    workload = CPU_WORKLOAD if platform == "cpu" else GPU_WORKLOAD
    if platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    with _weights_folder(workload) as folder:
        entries, notes = _entries(workload, folder, platform)
        entries = [entry for entry in entries if _is_wanted(entry.job.implementation)]
        measurements = harness.measure([entry.job for entry in entries], _REPEATS.value)
        rows = _rows(workload, entries, measurements, _weight_bytes(folder))
    notes += harness.failures(workload.name, measurements)
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def _is_wanted(implementation: str) -> bool:
    return implementation in (BASELINE, COPY) or _ONLY.value in implementation


def _entries(workload: Workload, folder: Path, platform: str) -> tuple[list[Entry], list[str]]:
    """Everything that can run here, and a line for what cannot."""

    def entry(name: str, build: Callable, *arguments, slots=None, peak_bytes=None) -> Entry:
        return Entry(harness.Job(name, build, (workload, folder, *arguments), peak_bytes), slots)

    everyone, notes = workload.num_prompts, []
    entries = [entry(BASELINE, build_static, slots=everyone)]
    if platform == "cpu":
        entries.append(entry("engine", build_engine, everyone, slots=everyone))
    else:
        entries.append(Entry(harness.Job(COPY, build_copy, ())))
        for slots in (64, 128, 256):
            entries.append(entry(f"engine, {slots} slots", build_engine, slots, slots=slots))
    if importlib.util.find_spec("torch") is None:
        notes.append("transformers is left out: pip install torch")
    else:
        peak_bytes = harness.torch_peak_bytes if platform == "gpu" else None
        for cache in TRANSFORMERS_CACHES:
            name = f"transformers, {cache} cache"
            entries.append(
                entry(name, build_transformers, cache, slots=everyone, peak_bytes=peak_bytes)
            )
    if _VLLM_PYTHON.value is None:
        notes.append(
            "vLLM is left out: --vllm_python=PATH of an interpreter of its own that has it"
        )
    else:
        for mode, arguments in VLLM_MODES.items():
            name = f"vLLM, {mode}"
            entries.append(
                entry(name, build_vllm, _VLLM_PYTHON.value, arguments, peak_bytes=_unknown)
            )
    return entries, notes


def _rows(workload: Workload, entries: list[Entry], measurements, weight_bytes: int):
    rows = harness.compare(workload.name, measurements, BASELINE)
    copied = measurements.get(COPY)
    for row, entry in zip(rows, entries, strict=True):
        seconds, samples = row["seconds"], row["implementation"] != COPY
        row["tokens_per_second"] = (
            round(workload.num_tokens / seconds) if seconds and samples else None
        )
        row["slots"] = entry.slots
        if copied is not None:
            row["of_bound"] = None
            if entry.slots and seconds and copied.seconds:
                needed = bytes_read(workload, entry.slots, weight_bytes)
                row["of_bound"] = needed / (2 * COPIED_BYTES / copied.seconds) / seconds
    return rows


def bytes_read(workload: Workload, slots: int, weight_bytes: int) -> int:
    """What decoding with so many slots must read at least; reading the prompts is not counted.

    An answer's first token comes with its prompt. Turn j after it reads the keys and values of the
    prompt and j tokens.
    """
    prompt_lengths = np.array([len(prompt) for prompt in workload.prompts], np.int64)
    row_turns = workload.lengths.astype(np.int64) - 1
    turns = max(int(row_turns.max()), math.ceil(row_turns.sum() / slots))
    cached = int((row_turns * prompt_lengths + row_turns * (row_turns + 1) // 2).sum())
    token_bytes = bytes_per_token(workload.config, jnp.dtype(workload.dtype), int8=False)
    return turns * weight_bytes + cached * token_bytes


def _unknown(run: Callable[[], None]) -> None:
    """No peak: the memory is another process's, which takes all of its cache when it starts."""


# ------------------------------------------------------------------------------------- weights


@contextlib.contextmanager
def _weights_folder(workload: Workload) -> Iterator[Path]:
    """Random weights as everyone reads them, for as long as they are needed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as parent:
        folder = Path(parent) / "model"
        # In a process of its own: this one must not hold the device.
        process = multiprocessing.get_context("spawn").Process(
            target=_export, args=(workload, folder)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise RunStopped(f"writing the weights to {folder} failed: see above")
        yield folder


def _export(workload: Workload, folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    config, dtype = workload.config, jnp.dtype(workload.dtype)
    model = Transformer(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    no_tokenizer = types.SimpleNamespace(save_pretrained=lambda folder: None)
    hf_config = hf_config_dict(config, eos_token_id=None, pad_token_id=None)
    export_model(folder, nnx.state(model, nnx.Param), config, hf_config, no_tokenizer, dtype)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _load(workload: Workload, folder: Path) -> tuple[nnx.GraphDef, nnx.State]:
    dtype = jnp.dtype(workload.dtype)
    shapes = nnx.eval_shape(
        lambda: Transformer(workload.config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )
    graphdef, abstract_params = nnx.split(shapes, nnx.Param)
    return graphdef, load_params(folder, workload.config, abstract_params, None, dtype)


# ------------------------------------------------------------------------------------- the runs


def build_engine(workload: Workload, folder: Path, slots: int):
    graphdef, params = _load(workload, folder)
    config = EngineConfig(max_length=LONGEST_PROMPT + MAX_LENGTH, num_slots=slots)
    facts = dict(eos_ids=(), pad_id=0, vocab_size=workload.config.vocab_size)
    engine = Engine(graphdef, config, **facts)
    request = RolloutRequest(
        workload.prompts,
        np.arange(workload.num_prompts),
        SamplingParams(max_length=MAX_LENGTH),
        max_lengths=workload.lengths,
    )

    def run():
        rollout, _ = engine.generate(params, request)  # on the host
        _check_lengths(rollout.lengths_b, workload)

    return run


def build_static(workload: Workload, folder: Path):
    graphdef, params = _load(workload, folder)
    prompts_bp, prompt_lengths_b = _padded(workload, left=False)
    generate = make_generate(
        graphdef,
        SamplingParams(max_length=MAX_LENGTH),
        eos_ids=(),
        pad_id=0,
        vocab_size=workload.config.vocab_size,
    )
    keys_b = row_keys(0, 0, np.arange(workload.num_prompts), np.zeros(workload.num_prompts, int))

    def run():
        jax.device_get(generate(params, prompts_bp, prompt_lengths_b, keys_b))

    return run


def _padded(workload: Workload, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one array, and their lengths."""
    prompts_bp = np.zeros((workload.num_prompts, LONGEST_PROMPT), np.int32)
    for row, prompt in zip(prompts_bp, workload.prompts, strict=True):
        row[slice(-len(prompt), None) if left else slice(len(prompt))] = prompt
    return prompts_bp, np.array([len(prompt) for prompt in workload.prompts], np.int32)


def _check_lengths(lengths, workload: Workload) -> None:
    if list(lengths) != list(workload.lengths):
        raise RuntimeError("answers have other lengths than were asked for")


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
    prompts_bp, prompt_lengths_b = _padded(workload, left=True)
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
    from distill.rollout.vllm.client import VllmClient
    from distill.rollout.vllm.server import OwnServer

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if jax.default_backend() != "cpu":  # the other workers are on the same GPU
        arguments = (*arguments, "--gpu-memory-utilization=0.3")
    server = OwnServer(
        python,
        folder.parent / f"vllm-{len(arguments)}.log",
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
    client = VllmClient(server.launch(folder), server.api_key)
    server.await_up(client, SERVER_START_SECONDS)
    pool = ThreadPoolExecutor(workload.num_prompts)
    prompts = [prompt.tolist() for prompt in workload.prompts]
    lengths = workload.lengths.tolist()

    def answer(prompt: list[int], length: int):
        return client.complete(prompt, max_tokens=length)

    def run():
        answers = list(pool.map(answer, prompts, lengths))
        _check_lengths([len(each.log_probs) for each in answers], workload)
        server.check_running()  # also holds on to it: it ends with this process

    return run


def build_copy():
    """Reads and writes an array: the yardstick for bandwidth."""
    x = jnp.zeros(COPIED_BYTES // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)

    def run():
        jax.block_until_ready(copy(x))

    return run


if __name__ == "__main__":
    cli.run(main)
