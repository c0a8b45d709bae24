"""Whole runs at toy size, for the tests that make them."""

import atexit
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from distill.config import default_config

_MODELS = "DISTILL_TEST_MODELS"
if _MODELS not in os.environ:  # processes that this one starts find it set
    os.environ[_MODELS] = tempfile.mkdtemp(prefix="tiny-models-")
    atexit.register(shutil.rmtree, os.environ[_MODELS], ignore_errors=True)


def random_model(like: Path | None = None, **sizes) -> str:
    """The folder of a model with random weights and the characters of arithmetic, made once.

    Sizes are of a dense model, or those of a config.json.
    """
    if like is None:
        sizes = dict(num_layers=1, num_heads=2, num_kv_heads=2, max_positions=64) | sizes
    name = "-".join(f"{key}{value}" for key, value in sorted(sizes.items()))
    name += like.stem if like else ""
    folder = Path(os.environ[_MODELS], name)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # Imported here: where the folder is made already, JAX may not be touched yet.
            from distill.build.scratch import make_random_model, make_random_model_like
            from distill.data.arithmetic import CHARACTERS
            from distill.data.tokenizer import character_tokenizer

            tokenizer = character_tokenizer(CHARACTERS)
            if like is None:
                make_random_model(folder, tokenizer, **sizes)
            else:
                make_random_model_like(folder, tokenizer, like, **sizes)
    return str(folder)


def tiny_config(**distillation) -> ConfigDict:
    """Random models on arithmetic: every part is real, nothing is learned."""
    config = default_config()
    config.preflight = False  # preflight_test.py has it; elsewhere it would only take time
    config.policy.model_name = random_model(model_width=16)
    config.distillation.teacher_model_path = random_model(model_width=32, vocab_size=24, seed=1)
    config.policy.precision = config.teacher.precision = "float32"
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


def train_killed(config: ConfigDict, workdir: Path, monkeypatch, step: int) -> None:
    """A run that ends behind an update as if it were killed there."""
    import pytest

    import distill
    from distill.run.progress import Progress

    end_step = Progress.end_step

    def dies(self, number, *values):
        end_step(self, number, *values)
        if number == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "end_step", dies)
        with pytest.raises(KeyboardInterrupt):
            distill.train(config, workdir)


def read_metrics(workdir: Path) -> list[dict]:
    """Lines without what depends on the clock."""
    clock = ("second", "queue_wait", "share_of_step", "compilation/")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(word in key for word in clock)}
        for line in lines
    ]
