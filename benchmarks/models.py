"""A train step and a decode step of families, ours and transformers' in torch; compilation.

    python -m benchmarks.models [--json=PATH] [--repeats=N] [--families=NAME,...]

How to read it. Each family is a random model of transformers with the sizes below, in float32, read
by both from one folder. A family's row is printed as soon as it is measured. Seconds are medians of
interleaved repeats, all on one CPU: threads that wait for each other would measure who else is at
work. `of torch` is the part of torch's time: 0.5 is twice as fast. Without `--families` there is
one of each kind: dense, with windows, a mixture of experts, recurrent.

A train step is that of benchmarks/train_step.py: the model and another of the same sizes as its
teacher, forward KL, 8 rows of up to 96 tokens in two microbatches, AdamW. A decode step is a 32nd
of what sampling 32 tokens for each of 16 prompts of 32 tokens takes, prefill included; torch keeps
its keys and values in the cache that transformers takes by itself. The first losses must agree.
`compiled` is the processor's time to compile the train step from nothing with 4 layers, or as many
as a longer pattern of layers has, and `8 x layers` what eight times as many take in parts of that.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.sampling_jobs import load_weights
from benchmarks.train_step_jobs import Workload, build_ours, build_torch, make_parts
from distill.base.errors import RunStopped, UserError
from distill.config import cli
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

T = TypeVar("T")
OURS, TORCH = "distill", "transformers"
NUM_PROMPTS, PROMPT, RESPONSE = 16, 32, 32
SHALLOW, TIMES = 4, 8
SIZES: dict[str, Any] = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
_RECURRENT = dict(
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
)
_EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256)
# By transformers' model_type, what a family has beside the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": _RECURRENT,
    "llama": {},
    "mistral": dict(sliding_window=64),
    "smollm3": {},
    "phi3": dict(sliding_window=None),
    "olmo2": {},
    "olmo3": dict(sliding_window=64),
    "exaone4": dict(sliding_window=64),
    "granite": {},
    "glm4": {},
    "gemma2": dict(sliding_window=64),
    "gemma3_text": dict(sliding_window=64, num_hidden_layers=6),
    "seed_oss": {},
    "ernie4_5": {},
    "helium": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_5_moe_text": _RECURRENT | _EXPERTS | dict(shared_expert_intermediate_size=256),
    "mixtral": dict(num_local_experts=8),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=64),
}

DEFAULTS = ["qwen3", "gemma3_text", "qwen3_moe", "qwen3_5_text"]

_FAMILIES = flags.DEFINE_list("families", DEFAULTS, "Families, by model_type.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each implementation.", lower_bound=1)


def main() -> None:
    harness.check_json_path()
    if unknown := set(_FAMILIES.value) - set(FAMILIES):
        raise UserError(f"--families={unknown.pop()}: there are {', '.join(FAMILIES)}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the workers inherit both
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    rows: list[harness.Row] = []
    print("family            train step  of torch  decode step  of torch  compiled  8 x layers")
    for family in _FAMILIES.value:
        row = _measure(family, _REPEATS.value)
        step, part, decode, decode_part, compiled, deep = list(row.values())[1:]
        print(
            f"{family:16} {step:9.3f} s {part:9.2f} {1e3 * decode:9.2f} ms {decode_part:9.2f} "
            f"{compiled:7.1f} s {deep:10.2f}",
            flush=True,
        )
        rows.append(row)
    harness.write_json(rows)


def _measure(family: str, repeats: int) -> harness.Row:
    """RunStopped where there is no model of the family, or an implementation fails."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        _alone(_write_models, family, folder)
        config, _ = load_model_config(folder / "student")
        workload, student = _workload(family, config), folder / "student"
        train = {
            OURS: (build_ours, (workload, folder, False, True)),
            TORCH: (build_torch, (workload, folder, False)),
        }
        decode = {
            OURS: (build_engine, (config, student)),
            TORCH: (build_generate, (student,)),
        }
        step, part = _compared(family, train, repeats)
        sampling, decode_part = _compared(family, decode, repeats)
    shallow, deep = _alone(compilation, family, config)
    return {
        "family": family,
        "train_step_seconds": step,
        "train_step_of_torch": part,
        "decode_step_seconds": sampling / RESPONSE,
        "decode_step_of_torch": decode_part,
        "compilation_seconds": shallow,
        "compilation_of_8_times_the_layers": deep / shallow,
    }


def _compared(family: str, jobs: dict[str, tuple], repeats: int) -> tuple[float, float]:
    """Our seconds, and their part of torch's."""
    found = harness.measure([harness.Job(name, *job) for name, job in jobs.items()], repeats)
    if failures := harness.failures(family, found):
        raise RunStopped("; ".join(failures))
    ours, torch = found[OURS].seconds, found[TORCH].seconds
    assert ours and torch  # nothing failed
    return ours, ours / torch


def _alone(function: Callable[..., T], *arguments: Any) -> T:
    """What the function gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _write_models(family: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / role)


def _workload(family: str, config: ModelConfig) -> Workload:
    return Workload(
        family,
        config,
        config,
        "float32",
        rows=8,
        prompt=32,
        response=64,
        microbatches=2,
        matrix=0,
    )


def _prompts(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocab_size, (NUM_PROMPTS, PROMPT))


def build_engine(config: ModelConfig, folder: Path):
    graph, params = load_weights(config, "float32", folder)
    sizes = EngineConfig(max_length=PROMPT + RESPONSE, num_slots=NUM_PROMPTS)
    engine = Engine(graph, sizes, eos_ids=(), pad_id=0, vocab_size=config.vocab_size)
    prompts = tuple(_prompts(config.vocab_size).astype(np.int32))
    sampling = SamplingParams(max_length=RESPONSE)
    request = RolloutRequest(prompts, np.arange(NUM_PROMPTS), sampling)

    def run() -> None:
        rollout, _ = engine.generate(params, request)  # on the host
        if rollout.tokens_br.shape != (NUM_PROMPTS, RESPONSE):
            raise RuntimeError(f"responses of shape {rollout.tokens_br.shape}")

    return run


def build_generate(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.from_numpy(_prompts(model.config.vocab_size))
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=RESPONSE, pad_token_id=0
    )

    def run() -> None:
        found = model.generate(**inputs, generation_config=settings)
        if found.shape != (NUM_PROMPTS, PROMPT + RESPONSE):
            raise RuntimeError(f"transformers returned an array of shape {tuple(found.shape)}")

    return run


def compilation(family: str, config: ModelConfig) -> tuple[float, float]:
    """The processor's seconds to compile the train step of few layers, and of many."""
    jax.config.update("jax_enable_compilation_cache", False)
    seconds, shallow = [], max(SHALLOW, len(config.pattern))
    for layers in (shallow, shallow, TIMES * shallow):  # the first warms the compiler up
        workload = _workload(family, dataclasses.replace(config, num_layers=layers))
        state, teachers, step = make_parts(workload, None)
        jax.block_until_ready((state, teachers))  # else they are made meanwhile
        start = time.process_time()
        step.lower(state, teachers, (workload.batch(),)).compile()
        seconds.append(time.process_time() - start)
        jax.clear_caches()
    return seconds[1], seconds[2]


if __name__ == "__main__":
    cli.run(main)
