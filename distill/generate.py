"""Writes a model's answers to JSONL, to be used as fixed data (lambda_ < 1, or SFT on them).

    python -m distill.generate --config=configs/gsm8k.py --output=runs/teacher.jsonl

The model is the config's teacher unless --model names another; sampling follows
distillation.generate_strategy, and the engine is the trainer's. Each line has id, prompt, response
and answer, so `data.name=jsonl data.path=runs/teacher.jsonl` reads it, with
`data.validation.name=gsm8k` for the held-out prompts. Answers cut off at the
length limit are left out and counted: trained on, they would teach the student to stop anywhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from distill.base import processes
from distill.base.errors import UserError
from distill.base.status import busy, shows_bars
from distill.build.data import build_dataset, build_prompts, build_vocabulary
from distill.build.devices import build_mesh
from distill.build.models import build_frozen_model, teacher_dtype
from distill.build.plugins import import_plugins
from distill.build.sampler import build_engine, build_sampling_params
from distill.config import cli
from distill.config.parse import parse_config
from distill.config.schema import Config
from distill.data.base import Example
from distill.data.prompts import wrap_prompt
from distill.evaluation.evaluator import decode_responses
from distill.models.checkpoints.hub import resolve_model
from distill.sampling.request import RolloutRequest

# Many more than there are slots, few enough for the host's memory.
_PROMPTS_PER_REQUEST = 4096


def generate(config: ConfigDict, model_path: str, output: str | Path) -> dict[str, int]:
    """Answers every prompt of `data` num_generations times.

    Args:
      config: data, generate_strategy, teacher.precision and seed are used.
      model_path: folder or hub id of the model that answers.
      output: JSONL file, which appears when it is complete.

    Returns:
      {'written': lines, 'truncated': answers left out}.
    """
    config = config.copy_and_resolve_references()
    config.policy.model_name = model_path
    config.distillation.hard_labels, config.distillation.lambda_ = True, 0.0
    config.teacher.backend = "local"  # this program is what answers
    repeats = config.distillation.generate_strategy.num_generations
    config.distillation.generate_strategy.num_generations = 1
    parsed = parse_config(config)
    import_plugins(parsed)
    mesh = build_mesh(parsed)
    with jax.set_mesh(mesh):
        return _generate(parsed, repeats, Path(output), mesh)


def _generate(config: Config, repeats: int, output: Path, mesh) -> dict[str, int]:
    folder = resolve_model(config.policy.model_name)
    vocabulary = build_vocabulary(folder, None)
    dataset = build_dataset(config)
    prompts = build_prompts(config, dataset, vocabulary.tokenizer)
    with busy("loading the model"):
        model = build_frozen_model(config, folder, mesh, teacher_dtype(config))
    engine = build_engine(config, model.graph, vocabulary)
    params = build_sampling_params(config)
    template = config.data.prompt_template or dataset.get_prompt_template()
    counts = {"written": 0, "truncated": 0}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    writes = processes.is_first()
    with (
        open(temporary if writes else os.devnull, "w") as file,
        tqdm(total=len(prompts), unit="prompt", disable=not shows_bars()) as bar,
    ):
        bar.write(f"data: {prompts.summary()}")
        for start in range(0, len(prompts), _PROMPTS_PER_REQUEST):
            tokens = tuple(prompts.prompt_tokens[start : start + _PROMPTS_PER_REQUEST])
            index = np.arange(start, start + len(tokens))
            request = RolloutRequest(
                tokens, index, params, num_generations=repeats, seed=config.seed
            )
            rollout, _ = engine.generate(model.params, request)
            texts = decode_responses(vocabulary.tokenizer, rollout)
            for row, (text, stopped) in enumerate(zip(texts, rollout.stopped_b, strict=True)):
                counts["written" if stopped else "truncated"] += 1
                if stopped:
                    example = dataset[int(prompts.rows[start + row // repeats])]
                    line = _line(example, text, row % repeats, template)
                    file.write(json.dumps(line) + "\n")
            bar.update(len(tokens))
    if writes:
        os.replace(temporary, output)
    return counts


def _line(example: Example, response: str, generation: int, template: str) -> dict[str, Any]:
    # With the template's words: those who read the file need not know of it.
    prompt = wrap_prompt(example.prompt, template)
    line = {"id": f"{example.id}/{generation}", "prompt": prompt, "response": response}
    return line if example.answer is None else {**line, "answer": example.answer}


def main() -> None:
    config = cli.required_config(config_flag)
    model_path = model_flag.value or config.distillation.teacher_model_path
    if not model_path:
        raise UserError("pass --model=PATH: the config names no distillation.teacher_model_path")
    if not output_flag.value:
        raise UserError("pass --output=FILE.jsonl")
    cli.join_processes()
    counts = generate(config, model_path, output_flag.value)
    print(f"{output_flag.value}: {counts['written']} answers, {counts['truncated']} cut off")


if __name__ == "__main__":
    config_flag = cli.define_config_flag()
    model_flag = flags.DEFINE_string("model", None, "Folder or hub id; default: the teacher.")
    output_flag = flags.DEFINE_string("output", None, "JSONL file to write.")
    cli.run(main)
