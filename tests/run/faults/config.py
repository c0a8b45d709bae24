"""A tiny run with faults, one of whose teachers is in the train state; argument: the models."""

from ml_collections import ConfigDict
from tiny_runs import tiny_config, with_models


def get_config(folder: str) -> ConfigDict:
    config = tiny_config(lambda_=0.7, eval_steps=3, save_steps=1)
    config.plugins = ("fault_plugin",)
    config = with_models(config, {role: f"{folder}/{role}" for role in ("student", "teacher")})
    fixed = config.distillation.teacher_model_path
    config.distillation.teacher_model_path, config.teacher.precision = "", "bfloat16"
    with config.unlocked():
        config.teachers = {
            # Which only the checkpoint has.
            "average": dict(model="ema", ema_decay=0.75, prompt_template="{answer}={problem}"),
            "fixed": dict(model=fixed, precision="float32", weight=0.5),
        }
    return config
