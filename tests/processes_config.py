"""A tiny run for several processes; argument: data,fsdp,tensor of its mesh."""

from ml_collections import ConfigDict
from tiny_runs import tiny_config


def get_config(mesh: str) -> ConfigDict:
    config = tiny_config(lambda_=0.7, eval_steps=3, save_steps=3)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = map(int, mesh.split(","))
    config.policy.shape.vocab_size = 24  # the tokenizer's 17 ids would not divide
    config.teacher.pretrain.steps = 2
    config.preflight = True
    config.plugins = ("fault_plugin",)
    return config
