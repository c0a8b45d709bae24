"""A student learns to call a calculator, from a teacher that does.

python -m distill.main --config=configs/tools.py --workdir=runs/tools

The built-in student writes all steps of a chain of operations itself. The teacher ends its turn
behind every "="; the calculator replies with the rest of the line. Rollouts are dialogues: the
student is taught on its own turns, and reads what the calculator says. About three minutes on two
shared CPU cores. On 256 held-out problems, of which the longest are cut off at 50 tokens,

    base     accuracy 41.4% (35.5% - 47.5%)
    student  accuracy 86.3% (81.6% - 90.0%), 4.2 turns a problem
    teacher  accuracy 88.3% (83.8% - 91.7%)

    python -m distill.main --config=configs/tools.py:smoke --workdir=runs/tools_smoke

makes two updates of a few dialogues. The teacher was made from random weights by

    python -m distill.scratch --config=configs/tools.py:teacher \
        --tokenizer=characters:arithmetic --layers=3 --width=64 --heads=4 --kv_heads=4
    python -m distill.main --config=configs/tools.py:teacher --workdir=runs/tools/teacher
"""

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "teacher"):
        raise ValueError(f"argument {arg!r}: allowed are smoke, teacher")
    config = default_config()
    config.policy.precision = "float32"
    config.policy.max_total_sequence_length = 64
    config.distillation.generate_strategy.max_length = 50
    config.policy.train_global_batch_size = 64
    config.policy.train_micro_batch_size = 64
    config.policy.optimizer.schedule = "cosine"
    config.policy.optimizer.learning_rate = 2e-3
    config.data.name = "arithmetic"
    config.data.shuffle = True
    config.environment.name = "python_tool"
    config.environment.call = r"([-+*\d]+)=$"
    config.evaluation.batch_size = 128
    config.checkpointing.export_dtype = "float32"
    if arg == "teacher":
        config.policy.model_name = "runs/tools/random"
        config.data.subset = "tools"
        config.data.special_tokens = "control"
        config.distillation.hard_labels = True
        config.distillation.lambda_ = 0.0
        config.distillation.max_steps = 1000
        config.distillation.eval_steps = 250
        config.checkpointing.export_dtype = "bfloat16"
        return config
    config.distillation.teacher_model_path = "embedded:tools-teacher"
    config.policy.model_name = "embedded:arithmetic-student"
    config.teacher.precision = "float32"
    config.distillation.max_steps = 2 if arg == "smoke" else 150
    config.distillation.eval_steps = 50
    config.data.validation.max_samples = 16 if arg == "smoke" else 256
    if arg == "smoke":
        config.policy.train_global_batch_size = config.policy.train_micro_batch_size = 8
    return config
