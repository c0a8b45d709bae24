"""The built-in task: multi-step arithmetic, no download, minutes on two CPU cores.

    python -m distill.main --config=configs/arithmetic.py:few --workdir=runs/quickstart
    python -m distill.main --config=configs/arithmetic.py --workdir=runs/arithmetic

`few` is the quickstart: 384 problems, each seen 66 times. The other has 60,000, each seen at most
once. Greedy accuracy on 512 held-out problems, with 95% intervals:

    few   70.1% (66.0% - 73.9%)  from 27.1% (23.5% - 31.2%), two to six operations
    all   94.7% (92.4% - 96.4%)  from 42.2% (38.0% - 46.5%), one to six

With `--config.distillation.lambda_=0`, few ends at 32.8% (28.9% - 37.0%).
"""

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "few", "short"):
        raise ValueError(f"argument {arg!r}: allowed are few and short")
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
    if arg == "few":
        config.data.subset = "distinct"
        config.data.max_samples = 384
        config.distillation.max_steps = 400
        config.distillation.eval_steps = config.distillation.save_steps = 100
    return config
