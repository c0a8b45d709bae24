"""What benchmarks/decode.py measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.sampling_jobs import Workload, bytes_read, load_weights
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

PROMPT, RESPONSE = 64, 256


def measured(
    workload: Workload, slots: Sequence[int], response: int, repeats: int
) -> list[harness.Row]:
    graph, params = load_weights(workload.config, workload.dtype, None)
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    read = jax.jit(lambda weights: sum(x.sum(dtype=jnp.float32) for x in jax.tree.leaves(weights)))
    reading = fewest(lambda: timed(lambda: jax.block_until_ready(read(params))), repeats)
    rows = []
    for count in slots:
        engine = Engine(
            graph,
            EngineConfig(max_length=PROMPT + response, num_slots=count),
            eos_ids=(),
            pad_id=0,
            vocab_size=workload.config.vocab_size,
        )
        request = _request(workload, count, response)

        def decoding(engine=engine, request=request) -> float:
            _, found = engine.generate(params, request)
            return found["generation/decode_seconds"]

        seconds = fewest(decoding, repeats)
        must_read = bytes_read(request.prompts, request.max_lengths, workload, count, weight_bytes)
        steps = response - 1  # the first token comes with the prompt
        rows.append(
            {
                "model": workload.title,
                "slots": count,
                "ms_per_step": 1000 * seconds / steps,
                "tokens_per_second": round(count * steps / seconds),
                "of_read": must_read / seconds / (weight_bytes / reading),
            }
        )
        engine.release()
    return rows


def _request(workload: Workload, count: int, response: int) -> RolloutRequest:
    prompts = np.random.default_rng(0).integers(1, workload.config.vocab_size, (count, PROMPT))
    return RolloutRequest(
        tuple(prompts.astype(np.int32)),
        np.arange(count),
        SamplingParams(max_length=response),
        max_lengths=np.full(count, response, np.int32),
    )


def timed(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fewest(seconds: Callable[[], float], repeats: int) -> float:
    """Of some runs, after one that compiles and one that warms up."""
    return min([seconds() for _ in range(2 + repeats)][2:])
