"""A tiny run for several processes: models are cut over them as the batches are, experts too."""

from pathlib import Path

from ml_collections import ConfigDict
from tiny_runs import random_model, tiny_config


def get_config() -> ConfigDict:
    config = tiny_config(lambda_=0.7, eval_steps=3, save_steps=3)
    config.plugins = ("processes_plugin",)
    config.data.name = "chance"
    config.environment.name = "says_more"
    config.data.validation.max_samples = 9  # not as many for each
    # Of eight devices, the first four have half of the experts and all of tensor.
    config.mesh.data, config.mesh.expert, config.mesh.tensor = 1, 4, 2
    like = Path(__file__).parents[2] / "configs/tiny/qwen3_moe.json"
    # The tokenizer's 17 ids could not be cut.
    config.policy.model_name = random_model(like=like, vocab_size=24)
    config.checkpointing.export_dtype = "float32"
    return config
