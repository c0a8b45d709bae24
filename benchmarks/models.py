"""A train step and a decode step of each family, ours and transformers' in torch; compilation.

    python -m benchmarks.models [--json=PATH] [--repeats=N] [--families=NAME,...]

How to read it. Each family is a random model of transformers with the sizes below, in float32, read
by both from one folder. `ratio` is the part of torch's time: 0.5 is twice as fast. `seconds` are
medians of interleaved repeats on the first two CPUs.

A train step is that of benchmarks/train_step.py: the model and another of the same sizes as its
teacher, forward KL, 16 rows of up to 128 tokens in two microbatches, AdamW. A decode step is a
64th of what sampling 64 tokens for each of 16 prompts of 32 tokens takes, prefill included; torch
keeps its keys and values in the cache that transformers takes by itself. The first losses must
agree. `compilation` is that of the train step, from nothing, and its `ratio` is to 4 layers.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.sampling_jobs import load_weights
from benchmarks.train_step_jobs import CPUS, Workload, build_ours, build_torch, make_parts
from distill.base.errors import RunStopped, UserError
from distill.config import cli
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import ModelConfig
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

OURS, TORCH = "distill", "transformers"
NUM_PROMPTS, PROMPT, RESPONSE = 16, 32, 64
SHALLOW, DEEP = 4, 32
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

_FAMILIES = flags.DEFINE_list("families", list(FAMILIES), "Families, by model_type.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)


def main() -> None:
    harness.check_json_path()
    if unknown := set(_FAMILIES.value) - set(FAMILIES):
        raise UserError(f"--families={unknown.pop()}: there are {', '.join(FAMILIES)}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the workers inherit both
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])
    rows, notes = [], []
    for family in _FAMILIES.value:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for kind, jobs, baseline in _comparisons(family, Path(folder)):
                name = f"{family}, {kind}"
                measurements = harness.measure(jobs, _REPEATS.value)
                rows += harness.compare(name, measurements, baseline)
                notes += harness.failures(name, measurements)
    for row in rows:
        del row["peak_bytes"], row["peak_ratio"]  # not compared: torch keeps what it frees
        if row["seconds"] and row["name"].endswith("decode step"):
            row["seconds"] /= RESPONSE
    harness.print_rows(rows)
    print(*notes, sep="\n")
    harness.write_json(rows)


def _comparisons(family: str, folder: Path) -> list[tuple[str, list[harness.Job], str]]:
    """What is compared, the jobs, and the one that the others are compared with."""
    process = multiprocessing.get_context("spawn").Process(
        target=_write_models, args=(family, folder)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RunStopped(f"transformers made no model of {family}: see above")
    config, _ = load_model_config(folder / "student")
    workload = _workload(family, config)
    deep = _workload(family, dataclasses.replace(config, num_layers=DEEP))
    shallow = _workload(family, dataclasses.replace(config, num_layers=SHALLOW))
    train = [
        harness.Job(OURS, build_ours, (workload, folder, False, True)),
        harness.Job(TORCH, build_torch, (workload, folder, False)),
    ]
    decode = [
        harness.Job(OURS, build_engine, (config, folder / "student")),
        harness.Job(TORCH, build_generate, (folder / "student",)),
    ]
    compiled = [
        harness.Job(f"{layers.student.num_layers} layers", build_compilation, (layers,))
        for layers in (shallow, deep)
    ]
    return [
        ("train step", train, TORCH),
        ("decode step", decode, TORCH),
        ("compilation", compiled, f"{SHALLOW} layers"),
    ]


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
        rows=16,
        prompt=32,
        response=96,
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

    torch.set_num_threads(CPUS)
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


def build_compilation(workload: Workload):
    jax.config.update("jax_enable_compilation_cache", False)
    state, teacher_params, step = make_parts(workload, None)
    batch = workload.batch()

    def run() -> None:
        jax.clear_caches()
        step.lower(state, teacher_params, (batch,)).compile()

    return run


if __name__ == "__main__":
    cli.run(main)
