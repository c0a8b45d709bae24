"""Tunix's side of benchmarks/sampling.py; its interpreter has Tunix and not this project.

    PYTHON benchmarks/sampling_tunix.py FOLDER WORK

FOLDER is a Qwen2 model; WORK is a JSON object: the prompts' tokens, their padded length, how many
tokens to sample for each, the end's number, which no model can sample. Samples once for each line
on standard input, and answers with the number of tokens on standard output.
"""

import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2 import model, params


class Numbers:
    """A word is the number of its token."""

    def __init__(self, end: int):
        self._end = end

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # adds none

    def eos_id(self) -> int:
        return self._end

    def pad_id(self) -> int:
        return 0


def make_sampler(folder: Path, work: dict) -> Sampler:
    facts = json.loads((folder / "config.json").read_text())
    head_dim = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
    config = model.ModelConfig(
        num_layers=facts["num_hidden_layers"],
        vocab_size=facts["vocab_size"],
        embed_dim=facts["hidden_size"],
        hidden_dim=facts["intermediate_size"],
        num_heads=facts["num_attention_heads"],
        head_dim=head_dim,
        num_kv_heads=facts["num_key_value_heads"],
        rope_theta=int(work["rope_theta"]),
        norm_eps=facts["rms_norm_eps"],
        use_tied_embedding=facts["tie_word_embeddings"],
    )
    transformer = params.create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)
    cache = CacheConfig(
        cache_size=work["prompt_length"] + work["response_length"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=head_dim,
    )
    return Sampler(transformer, Numbers(work["end"]), cache)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an answer
    folder, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    sampler = make_sampler(folder, work)
    prompts = [" ".join(map(str, prompt)) for prompt in work["prompts"]]
    for seed, _ in enumerate(sys.stdin):
        sampled = sampler(
            prompts,
            max_generation_steps=work["response_length"],
            max_prompt_length=work["prompt_length"],
            temperature=1.0,
            top_p=1.0,  # without, it takes the likeliest token
            return_logprobs=True,
            seed=seed,
        )
        print(sum(map(len, sampled.tokens)), file=answers, flush=True)


if __name__ == "__main__":
    main()
