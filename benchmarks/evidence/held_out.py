"""What students say to the held-out problems of a task, with programs compiled once for all."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from distill.build.plugins import import_plugins
from distill.build.session import Session
from distill.config.parse import parse_config
from distill.data.base import Example
from distill.evaluation.evaluator import decode_responses
from distill.models.checkpoints.hub import resolve_model
from distill.sampling.choice import SamplingParams


class HeldOut:
    """Problems of data.validation in a config, all of which models are asked."""

    def __init__(self, config: ConfigDict):
        parsed = parse_config(config)
        import_plugins(parsed)
        self._session = Session(parsed)

    def responses(self, model: Path | str, *, greedy: bool) -> list[tuple[Example, str]]:
        """Greedy ones, or sampled at temperature 1, with what was asked."""
        session = self._session
        with jax.set_mesh(session.mesh):
            loaded = session.load_frozen(resolve_model(str(model)), "float32")
            evaluator = session.evaluator
            length = session.config.distillation.generate_strategy.max_length
            sampling = SamplingParams(max_length=length, greedy=greedy)
            rollout = evaluator.respond(loaded.graph, loaded.fetch(), sampling)
        texts = decode_responses(evaluator.vocabulary.tokenizer, rollout)
        asked = (evaluator.dataset[int(row)] for row in evaluator.prompts.rows)
        return list(zip(asked, texts, strict=True))

    def is_correct(self, example: Example, response: str) -> bool:
        return bool(self._session.evaluator.dataset.is_correct(example, response))
