"""The embedded default: multi-step arithmetic, no download, minutes on two CPU cores.

python -m distill.main --config=configs/arithmetic.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "short"):
        raise ValueError(f"argument {arg!r}: allowed is short")
    short = arg == "short"
    config = default_config()
    config.distillation.teacher_model_path = "embedded:arithmetic-teacher"
    config.policy.model_name = "embedded:arithmetic-student"
    config.distillation.kl_type = "forward"
    config.distillation.lambda_ = 1.0
    config.distillation.max_steps = 350 if short else 600
    config.distillation.eval_steps = 0 if short else 150
    config.distillation.save_steps = 175 if short else 150
    config.distillation.logging_steps = 10
    config.distillation.generate_strategy.max_length = 48
    config.policy.max_total_sequence_length = 64
    config.policy.precision = "float32"
    config.teacher.precision = "float32"
    config.policy.train_global_batch_size = 64
    config.policy.train_micro_batch_size = 64
    config.policy.optimizer.learning_rate = 2e-3
    config.policy.optimizer.schedule = "cosine"
    config.data.name = "arithmetic"
    config.data.shuffle = True
    config.data.validation.max_samples = 256 if short else 512
    config.evaluation.batch_size = 128 if short else 256
    config.checkpointing.export_dtype = "float32"
    return config
