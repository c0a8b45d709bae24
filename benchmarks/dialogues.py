"""Time of dialogues of two turns: slots that keep their cache against prefilling again.

    python -m benchmarks.dialogues [--json=PATH] [--repeats=N]

How to read it. The same model, prompts of 256 tokens, turns of the same lengths (16 tokens in the
mean, as random weights end them) and replies of 24 tokens for both. `slots kept` samples
dialogues: a reply is read in the decode loop of the slot that holds the turns before it.
`prefilled again` asks the engine anew for every turn, with all that came before as the prompt.
`ratio` is the part of the latter's time. `seconds` is a median of interleaved repeats, on the first
two CPUs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import harness
from benchmarks.sampling_jobs import CPU_WORKLOAD, GPU_WORKLOAD, Workload, load_weights
from distill.config import cli
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

PROMPT, REPLY, LONGEST_TURN, TURNS = 256, 24, 160, 2
MEAN_TURN = 16  # one id of so many ends a turn, and all are about as likely
CPUS, SLOTS = 2, 32
BASELINE, KEPT = "prefilled again", "slots kept"
MAX_LENGTH = TURNS * LONGEST_TURN + REPLY

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each implementation.", lower_bound=1)


class Others:
    """Says the same after every first turn, at once, and nothing after the last."""

    def __init__(self, reply_t: np.ndarray):
        self._reply_t, self._asked = reply_t, []
        self.turns: dict[int, list[np.ndarray]] = {}

    def ask(self, row, tokens_t):
        self.turns.setdefault(row, []).append(tokens_t)
        self._asked.append(row)

    def replies(self, wait):
        asked, self._asked = self._asked, []
        return [(row, self._reply_t if len(self.turns[row]) < TURNS else None) for row in asked]


def main() -> None:
    harness.check_json_path()
    platform = harness.select_platform()
    workload = CPU_WORKLOAD if platform == "cpu" else GPU_WORKLOAD
    if platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])  # the workers inherit it
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        builders = {KEPT: build_dialogues, BASELINE: build_prompts}  # the first says the turns
        jobs = [harness.Job(n, b, (workload, Path(folder))) for n, b in builders.items()]
        measurements = harness.measure(jobs, _REPEATS.value)
    rows = harness.compare(f"two turns, {workload.name}", measurements, BASELINE)
    harness.print_rows(rows)
    print(*harness.failures("dialogues", measurements), sep="\n")
    harness.write_json(rows)


def build_dialogues(workload: Workload, folder: Path):
    ends = tuple(range(0, workload.config.vocab_size, MEAN_TURN))
    engine, params = _make_engine(workload, ends)
    reply_t = np.arange(REPLY, dtype=np.int32)  # ends among them
    sampling = SamplingParams(max_length=MAX_LENGTH)
    prompts = _prompts(workload)

    def run() -> Others:
        others = Others(reply_t)
        request = RolloutRequest(prompts, np.arange(len(prompts)), sampling, turns=others)
        rollout, _ = engine.generate(params, request)
        if not rollout.stopped_b.all():
            raise RuntimeError("a turn was cut off: raise LONGEST_TURN")
        return others

    turns = run().turns
    for turn in range(TURNS):
        np.save(folder / f"{turn}.npy", [len(turns[row][turn]) for row in range(len(prompts))])
    return lambda: run() and None


def build_prompts(workload: Workload, folder: Path):
    engine, params = _make_engine(workload, ())
    reply_t = np.arange(REPLY, dtype=np.int32)
    lengths = [np.load(folder / f"{turn}.npy").astype(np.int32) for turn in range(TURNS)]
    sampling = SamplingParams(max_length=LONGEST_TURN)

    def run():
        prompts = _prompts(workload)
        for lengths_b in lengths:
            request = RolloutRequest(
                prompts, np.arange(len(prompts)), sampling, max_lengths=lengths_b
            )
            rollout, _ = engine.generate(params, request)
            said = [t[:n] for t, n in zip(rollout.tokens_br, rollout.lengths_b, strict=True)]
            prompts = tuple(np.concatenate([*x, reply_t]) for x in zip(prompts, said, strict=True))

    return run


def _make_engine(workload: Workload, ends: tuple[int, ...]):
    graphdef, params = load_weights(workload.config, workload.dtype, None)
    config = EngineConfig(max_length=PROMPT + MAX_LENGTH, num_slots=SLOTS)
    facts = dict(eos_ids=ends, pad_id=0, vocab_size=workload.config.vocab_size)
    return Engine(graphdef, config, **facts), params


def _prompts(workload: Workload) -> tuple[np.ndarray, ...]:
    shape = workload.num_prompts, PROMPT
    return tuple(np.random.default_rng(0).integers(0, workload.config.vocab_size, shape, np.int32))


if __name__ == "__main__":
    cli.run(main)
