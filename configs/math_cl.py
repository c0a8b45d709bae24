"""The flagship: Qwen2.5-32B-Instruct teaches Qwen2.5-1.5B-Instruct on pe-nlp/math-cl.

    python -m distill.main --config=configs/math_cl.py --workdir=runs/math_cl

Hardware: a TPU slice or GPUs whose memory together holds about 64 GB of teacher (bf16), 18 GB of
student and optimizer (float32), and activations; weights are split over all devices (mesh.fsdp).
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.main --config=configs/math_cl.py:lora --workdir=runs/math_cl_lora

trains adapters of rank 32 in place of the student: 0.6 GB with gradients and moments, beside 3 GB
of the frozen student (bf16), and checkpoints of that size.

    python -m distill.scratch --config=configs/math_cl.py:smoke --tokenizer=bpe:400 \
        --width=32 --vocab_size=416
    python -m distill.scratch --config=configs/math_cl.py:smoke --layers=3 --vocab_size=448 \
        --tokenizer=runs/random/math_cl_student --seed=1 --output=runs/random/math_cl_teacher
    python -m distill.main --config=configs/math_cl.py:smoke --workdir=runs/math_cl_smoke

runs the same code in one to three minutes on a CPU: tiny random models with differently padded
vocabularies, and a local JSONL with math-cl's columns. configs/qwen3.py, qwen35.py, gemma.py and
moe.py are this with other models.
"""

from pathlib import Path

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "lora"):
        raise ValueError(f"argument {arg!r}: allowed are smoke and lora")
    if arg == "smoke":
        return smoke("math_cl")
    config = distil("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct")
    if arg == "lora":
        config.policy.lora.rank = 32
        config.policy.optimizer.learning_rate = 2e-4  # ten times that of all weights
    return config


def distil(teacher: str, student: str) -> ConfigDict:
    config = default_config()
    config.distillation.teacher_model_path = teacher
    config.distillation.kl_type = "forward"
    config.distillation.lambda_ = 1.0
    config.distillation.max_steps = 1000
    config.distillation.eval_steps = 100
    config.distillation.save_steps = 100
    config.distillation.generate_strategy.max_length = 2048
    config.policy.model_name = student
    config.policy.max_total_sequence_length = 3072
    config.policy.train_global_batch_size = 64
    config.policy.train_micro_batch_size = 32
    config.policy.sequence_packing.enabled = True
    config.policy.activation_checkpointing = "full"
    config.data.name = "math_cl"
    config.data.validation.split = "math500"
    config.data.validation.max_samples = 500
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config


def smoke(name: str) -> ConfigDict:
    """The same code in little, with the models runs/random/NAME_teacher and NAME_student."""
    config = distil(f"runs/random/{name}_teacher", f"runs/random/{name}_student")
    config.distillation.max_steps = 4
    config.distillation.eval_steps = 2
    config.distillation.save_steps = 2
    config.distillation.logging_steps = 1
    config.distillation.generate_strategy.max_length = 24
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
