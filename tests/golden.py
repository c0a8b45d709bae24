"""Golden artefacts: run before and after a change that must change nothing, and compare.

    PYTHONPATH=. python tests/golden.py --output=FOLDER     # then: diff -r BEFORE AFTER

Writes metrics.jsonl without what depends on the clock and digests of the exported weights (a whole
short run on arithmetic), digests of the engine's tokens and log-probabilities, and the plan on
eight CPU devices (whose rates are measured). Bits depend on the processor and on JAX's version:
compare on one machine.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

CLOCK = ("second", "queue_wait", "share_of_step", "compilation/")


def command(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def run_artefacts(folder: Path) -> None:
    workdir = folder / "run"
    if not (workdir / "student").exists():
        command(
            "distill.main",
            "--config=configs/arithmetic.py:short",
            f"--workdir={workdir}",
            "--config.logger.progress_bar=False",
        )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in lines
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((workdir / "student").glob("*.safetensors"))
    }
    (folder / "weights.json").write_text(json.dumps(digests, indent=2) + "\n")


def engine_artefacts(folder: Path) -> None:
    import numpy as np

    from distill.sampling.choice import SamplingParams
    from distill.sampling.engine import Engine, EngineConfig
    from distill.sampling.request import RolloutRequest

    graph, params, vocab_size, eos, pad = student()
    engine = Engine(
        graph,
        EngineConfig(max_length=64, num_slots=8),
        eos_ids=eos,
        pad_id=pad,
        vocab_size=vocab_size,
    )
    rng = np.random.default_rng(0)
    prompts = tuple(
        rng.integers(3, vocab_size, rng.integers(1, 14)).astype(np.int32) for _ in range(12)
    )
    made = {}
    for name, sampling in dict(
        sampled=SamplingParams(max_length=40),
        truncated=SamplingParams(max_length=40, temperature=0.8, top_k=5, top_p=0.9),
        greedy=SamplingParams(max_length=40, greedy=True),
    ).items():
        request = RolloutRequest(
            prompts, np.arange(len(prompts)), sampling, num_generations=2, seed=3, step=5
        )
        rollout, _ = engine.generate(params, request)
        for field, array in vars(rollout).items():
            if field.endswith("columns"):  # empty: no dialogue, and no experts that are recorded
                continue
            made[f"{name}_{field}"] = hashlib.sha256(
                np.ascontiguousarray(array).tobytes()
            ).hexdigest()
        made[f"{name}_first"] = np.asarray(rollout.tokens_br[0]).tolist()
    (folder / "engine.json").write_text(json.dumps(made, indent=1) + "\n")


def student():
    """Graph, parameters and vocabulary of the built-in student, in float32."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from distill.data.tokenizer import end_ids, load_tokenizer, vocabulary_size
    from distill.models.checkpoints.hub import resolve_model
    from distill.models.checkpoints.load import load_params
    from distill.models.checkpoints.source import load_model_config
    from distill.models.transformer import Transformer

    source = resolve_model("embedded:arithmetic-student")
    config, _ = load_model_config(source)
    graph, shapes = nnx.split(
        nnx.eval_shape(
            lambda: Transformer(
                config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
            )
        ),
        nnx.Param,
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(
        source, config, shapes, jax.tree.map(lambda x: device, shapes), jnp.float32
    )
    tokenizer = load_tokenizer(source)
    return (
        graph,
        params,
        vocabulary_size(tokenizer),
        end_ids(tokenizer, source),
        tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    folder = Path(arguments.output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.only in ("", "run"):
        run_artefacts(folder)
    if arguments.only in ("", "engine"):
        engine_artefacts(folder)
    if arguments.only in ("", "plan"):
        (folder / "plan.txt").write_text(
            command("distill.plan", "--config=configs/arithmetic.py", "--topology=cpu:8")
        )


if __name__ == "__main__":
    main()
