"""What benchmarks/growth.py measures, and what it makes of it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.sampling_jobs import SMALL_CONFIG, load_weights
from benchmarks.train_step_jobs import Workload, join, linear_layers, make_parts
from distill.batches.packing import Layout, Shape, place
from distill.config.policy import Lora
from distill.data.sequences import Sequences
from distill.models.facts import ModelConfig
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

MODEL = dataclasses.replace(
    SMALL_CONFIG,
    vocab_size=4096,
    num_layers=2,
    model_width=128,
    num_heads=2,
    num_kv_heads=2,
    ffn_width=384,
)
PROMPT, SLOTS = 16, 8  # of decoding
LONGEST_RUN = 4096  # longer rows are compiled only
TOLERANCE = 0.15
PACKED = 2048


class Point(NamedTuple):
    """What one size takes; None: not measured, or nothing of the kind."""

    work: float
    seconds: float | None
    temporary: int | None = None
    compiling: float | None = None


@dataclasses.dataclass(frozen=True)
class Full(Workload):
    """All sequences as long as rows are."""

    def sequences(self) -> Sequences:
        random = np.random.default_rng(0)
        prompts, responses = (
            random.integers(1, self.student.vocab_size, (self.rows, length))
            for length in (self.prompt, self.response)
        )
        return join(
            prompts,
            np.full(self.rows, self.prompt),
            responses,
            np.full(self.rows, self.response),
        )


def workload(config: ModelConfig = MODEL, rows: int = 4, length: int = 256) -> Full:
    prompt = length // 4
    return Full(
        "",
        config,
        config,
        "float32",
        rows=rows,
        prompt=prompt,
        response=length - prompt,
        microbatches=max(rows // 2, 1),
        matrix=0,
    )


# ------------------------------------------------------------------------------ what is measured


def update(made: Full, teachers: int = 1, lora: Lora = Lora(), repeats: int = 1) -> Point:  # noqa: B008
    state, weights, step = make_parts(made, None, teachers=teachers, lora=lora)
    batch = made.dealt_batch(teachers)
    jax.block_until_ready((state, weights))  # else they are made meanwhile
    start = time.process_time()
    compiled = step.lower(state, weights, batch).compile()
    compiling = time.process_time() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes
    work = made.flops() - (_saved_by(lora, made) if lora.rank else 0.0)
    if made.row_length > LONGEST_RUN:
        return Point(work, None, temporary, compiling)
    held = [state]

    def run() -> None:
        held[0], metrics = compiled(held[0], weights, batch)
        jax.block_until_ready((held[0], metrics))

    return Point(work, fewest_seconds(run, repeats), temporary, compiling)


def _saved_by(lora: Lora, made: Full) -> float:
    """Operations of the embedding's gradient, which frozen matrices have none of, less those of
    the factors: the products a @ b and their two gradients, for every microbatch."""
    layers = linear_layers(made.student, 1, 1)[:-1]
    factors = sum(6 * lora.rank * inputs * outputs for _, inputs, outputs in layers)
    responses = made.rows * made.response
    head = 2 * responses * made.student.model_width * made.student.vocab_size
    return head - made.microbatches * factors


def decoding(config: ModelConfig, length: int, slots: int, repeats: int) -> Point:
    graph, params = load_weights(config, "float32", None)
    sizes = EngineConfig(max_length=PROMPT + length, num_slots=slots, few_programs=True)
    engine = Engine(graph, sizes, eos_ids=(), pad_id=0, vocab_size=config.vocab_size)
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (slots, PROMPT))
    request = RolloutRequest(
        tuple(prompts.astype(np.int32)), np.arange(slots), SamplingParams(max_length=length)
    )

    def run() -> None:
        engine.generate(params, request)  # on the host

    run()
    seconds = fewest_seconds(run, repeats)
    positions = PROMPT + np.arange(length)
    products = 2 * sum(np.prod(sizes) for sizes in linear_layers(config, 1, 1))
    attention = 4 * config.num_layers * config.num_heads * config.head_width * positions
    work = slots * float(length * products + attention.sum())
    return Point(work, seconds, sum(x.nbytes for x in jax.tree.leaves(engine.slots.cache)))


def packing(sequences: int, repeats: int) -> Point:
    lengths = np.random.default_rng(0).integers(16, PACKED // 4, sequences)
    layout = Layout((Shape(1, PACKED),), packed=True)
    return Point(float(sequences), fewest_seconds(lambda: place(lengths, layout), repeats))


def fewest_seconds(run: Callable, repeats: int) -> float:
    """Of this process's processor time, after one run that is not timed."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


# ---------------------------------------------------------------------------------- what grows


def _of_vocabulary(size: int, repeats: int) -> Point:
    config = dataclasses.replace(MODEL, vocab_size=size)
    return update(workload(config, rows=1), repeats=repeats)


def _of_length(size: int, repeats: int) -> Point:
    return update(workload(rows=1, length=size), repeats=repeats)


def _of_depth(size: int, repeats: int) -> Point:
    return update(workload(dataclasses.replace(MODEL, num_layers=size)), repeats=repeats)


def _of_rows(size: int, repeats: int) -> Point:
    return update(workload(rows=size), repeats=repeats)


def _of_teachers(size: int, repeats: int) -> Point:
    return update(workload(rows=16), teachers=size, repeats=repeats)


def _of_rank(size: int, repeats: int) -> Point:
    return update(workload(rows=16), lora=Lora(rank=size), repeats=repeats)


def _of_response(size: int, repeats: int) -> Point:
    return decoding(MODEL, size, SLOTS, repeats)


def _of_slots(size: int, repeats: int) -> Point:
    return decoding(MODEL, 256, size, repeats)


def _of_decoded_vocabulary(size: int, repeats: int) -> Point:
    return decoding(dataclasses.replace(MODEL, vocab_size=size), 64, SLOTS, repeats)


VOCABULARIES = (32_768, 151_936, 262_144)
GROWTH: dict[str, tuple[Callable[[int, int], Point], Sequence[int]]] = {
    "update: vocabulary": (_of_vocabulary, VOCABULARIES),
    "update: row length": (_of_length, (1024, 2048, 4096, 8192, 32_768)),
    "update: layers": (_of_depth, (4, 16, 64)),
    "update: rows": (_of_rows, (8, 32, 128)),
    "update: teachers": (_of_teachers, (1, 2, 4, 8)),
    "update: LoRA's rank": (_of_rank, (8, 32, 128)),
    "decoding: vocabulary": (_of_decoded_vocabulary, VOCABULARIES),
    "decoding: response length": (_of_response, (512, 1024, 2048)),
    "decoding: slots": (_of_slots, (8, 32, 128)),
    "packing: sequences": (packing, (1024, 4096, 16_384)),
}


def measured(name: str, repeats: int) -> Iterator[tuple[int, Point]]:
    """Each size, in a process of their own."""
    function, sizes = GROWTH[name]
    with multiprocessing.get_context("spawn").Pool(1, _without_cache) as pool:
        for size in sizes:
            yield size, pool.apply(function, (size, repeats))


def _without_cache() -> None:
    jax.config.update("jax_enable_compilation_cache", False)


# ---------------------------------------------------------------------------------- what is said


def exponent(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Slope of log against log over the upper half of what was measured; None: of nothing."""
    pairs = [(s, v) for s, v in zip(sizes, values, strict=True) if v]
    if len(pairs) < 2:
        return None
    upper = np.log(np.array(pairs[(len(pairs) - 1) // 2 :], float))
    return float(np.polyfit(upper[:, 0], upper[:, 1], 1)[0])


def exponents(points: dict[int, Point]) -> dict[str, float | None]:
    """Of each field of a point. `work` is that of the sizes that were timed."""
    columns = {
        field: [getattr(point, field) for point in points.values()] for field in Point._fields
    }
    timed = [point.work if point.seconds else None for point in points.values()]
    return {
        name: exponent(list(points), each) for name, each in (columns | {"work": timed}).items()
    }


def faults(name: str, found: dict[str, float | None]) -> list[str]:
    """A line for what grows faster than it may."""
    work = found["work"] or 0.0
    # Memory and compilation grow in proportion at most, and not at all with what adds no work.
    allowed = {"seconds": work, "temporary": 1.0, "compiling": 1.0}
    return [
        f"FAULT {name}: {field} grow with exponent {slope:.2f}, allowed are {allowed[field]:.2f}"
        for field, slope in found.items()
        if field in allowed and slope is not None and slope > allowed[field] + TOLERANCE
    ]
