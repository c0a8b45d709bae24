"""A tiny run with faults; argument: the folder of its models."""

from ml_collections import ConfigDict
from tiny_runs import tiny_config, with_models


def get_config(folder: str) -> ConfigDict:
    config = tiny_config(lambda_=0.7, max_steps=40, eval_steps=3, save_steps=1)
    config.plugins = ("fault_plugin",)
    return with_models(config, {role: f"{folder}/{role}" for role in ("student", "teacher")})
