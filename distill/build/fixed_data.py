"""Writes a model's responses to JSONL, to be trained on as fixed data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distill.base import processes
from distill.base.status import busy, shows_bars
from distill.build.sampler import build_sampling_params
from distill.build.session import Session
from distill.data.base import Example
from distill.data.prompts import wrap_prompt
from distill.evaluation.evaluator import decode_responses
from distill.sampling.request import RolloutRequest

# Many more than there are slots, few enough for the host's memory.
_PROMPTS_PER_REQUEST = 4096


def write_responses(session: Session, output: Path, num_generations: int) -> dict[str, int]:
    """The student's responses to all prompts; see `distill.generate`."""
    config, dataset, vocabulary = session.config, session.dataset, session.vocabulary
    prompts = session.tokenize(dataset)
    with busy("loading the model"):
        model = session.load_frozen(session.student_folder, config.teacher.dtype)
    engine = session.build_engine(model.graph)
    params = build_sampling_params(config.distillation.generate_strategy)
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
                tokens, index, params, num_generations=num_generations, seed=config.seed
            )
            rollout, _ = engine.generate(model.params, request)
            texts = decode_responses(vocabulary.tokenizer, rollout)
            for row, (text, stopped) in enumerate(zip(texts, rollout.stopped_b, strict=True)):
                counts["written" if stopped else "truncated"] += 1
                if stopped:
                    example = dataset[int(prompts.rows[start + row // num_generations])]
                    line = _line(example, text, row % num_generations, template)
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
