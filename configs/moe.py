"""A mixture of experts teaches a dense model: Qwen3-30B-A3B teaches Qwen3-1.7B on pe-nlp/math-cl.

    python -m distill.main --config=configs/moe.py --workdir=runs/moe

Hardware: at least two 80 GB GPUs, or four TPU v5p chips. The weights are split over all devices
(mesh.fsdp); on 8 H200, `distill.plan` counts 7.6 GB of teacher and 19 GB in all for each.
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.scratch --config=configs/moe.py:smoke --tokenizer=bpe:400 --width=32
    python -m distill.scratch --config=configs/moe.py:smoke --tokenizer=bpe:400 --seed=1 \
        --like=configs/tiny/qwen3_moe.json --output=runs/random/moe_teacher
    python -m distill.main --config=configs/moe.py:smoke --workdir=runs/moe_smoke

runs the same code in about two minutes on a CPU: tiny random models, and a local JSONL with
math-cl's columns.
"""

from pathlib import Path

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    config = default_config()
    config.distillation.teacher_model_path = "Qwen/Qwen3-30B-A3B"
    config.distillation.kl_type = "reverse"
    config.distillation.max_steps = 1000
    config.distillation.eval_steps = 100
    config.distillation.save_steps = 100
    config.distillation.generate_strategy.max_length = 2048
    config.policy.model_name = "Qwen/Qwen3-1.7B"
    config.policy.max_total_sequence_length = 3072
    config.policy.train_global_batch_size = 64
    config.policy.train_micro_batch_size = 8
    config.policy.sequence_packing.enabled = True
    config.policy.activation_checkpointing = "full"
    config.data.name = "math_cl"
    config.data.validation.split = "math500"
    config.data.validation.max_samples = 500
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return _shrink(config) if arg == "smoke" else config


def _shrink(config: ConfigDict) -> ConfigDict:
    config.distillation.teacher_model_path = "runs/random/moe_teacher"
    config.distillation.max_steps = 4
    config.distillation.eval_steps = 2
    config.distillation.save_steps = 2
    config.distillation.logging_steps = 1
    config.distillation.generate_strategy.max_length = 24
    config.policy.model_name = "runs/random/moe_student"
    config.policy.max_total_sequence_length = 160
    config.policy.train_global_batch_size = 8
    config.policy.train_micro_batch_size = 4
    config.data.path = str(Path(__file__).resolve().parents[1] / "tests/data/math_cl.jsonl")
    config.data.holdout_fraction = 0.25
    config.data.validation.split = "validation"
    config.data.validation.max_samples = 8
    config.evaluation.batch_size = 8
    config.mesh.data, config.mesh.fsdp = -1, 1
    return config
