"""Whole runs at toy size, for the tests that make them."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from distill.config import default_config


def tiny_config(**distillation) -> ConfigDict:
    """Random models on arithmetic: every part is real, nothing is learned."""
    config = default_config()
    config.preflight = False  # preflight_test.py has it; elsewhere it would only take time
    config.policy.tokenizer = "characters:arithmetic"
    for section, width in ((config.policy, 16), (config.teacher, 32)):
        section.shape.num_layers = 1
        section.shape.model_width = width
        section.shape.num_heads = section.shape.num_kv_heads = 2
        section.shape.ffn_width = 2 * width
        section.precision = "float32"
    config.teacher.shape.vocab_size = 24
    config.policy.max_total_sequence_length = 36
    config.policy.train_global_batch_size = 8
    config.policy.train_micro_batch_size = 8
    config.policy.optimizer.learning_rate = 1e-2
    config.distillation.generate_strategy.max_length = 12
    config.distillation.max_steps = 6
    config.distillation.eval_steps = 0
    config.distillation.save_steps = 2
    config.distillation.logging_steps = 1
    config.data.max_samples = 64
    config.data.validation.max_samples = 8
    config.evaluation.batch_size = 8
    config.logger.progress_bar = False
    config.distillation.update(distillation)
    return config


def with_models(config: ConfigDict, models: dict[str, str]) -> ConfigDict:
    config.policy.model_name = models["student"]
    config.distillation.teacher_model_path = models["teacher"]
    return config


def read_metrics(workdir: Path) -> list[dict]:
    """Lines without what depends on the clock."""
    clock = ("second", "queue_wait", "share_of_step")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(word in key for word in clock)}
        for line in lines
    ]
