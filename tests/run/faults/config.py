"""A tiny run with faults, whose teacher is in the train state; argument: its models' folder."""

from ml_collections import ConfigDict
from tiny_runs import tiny_config, with_models


def get_config(folder: str) -> ConfigDict:
    config = tiny_config(lambda_=0.7, max_steps=40, eval_steps=3, save_steps=1)
    config.plugins = ("fault_plugin",)
    config = with_models(config, {role: f"{folder}/{role}" for role in ("student", "teacher")})
    config.distillation.teacher_model_path = "ema"  # which only the checkpoint has
    config.teacher.ema_decay, config.teacher.prompt_template = 0.75, "{answer}={problem}"
    return config
