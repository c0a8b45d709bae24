"""Supervised fine-tuning with the distillation trainer: lambda_=0 and hard labels, no teacher.

Fine-tune a Hugging Face model on a dataset with responses:

    python -m distill.main --config=configs/sft.py --workdir=runs/sft \
        --config.policy.model_name=Qwen/Qwen2.5-1.5B --config.data.name=gsm8k

The built-in models of configs/arithmetic.py were made from random weights by

    python -m distill.scratch --config=configs/sft.py:arithmetic_teacher \
        --tokenizer=characters:arithmetic --layers=4 --width=128 --heads=4 --kv_heads=4
    python -m distill.main --config=configs/sft.py:arithmetic_teacher --workdir=runs/teacher
    python -m distill.scratch --config=configs/sft.py:arithmetic_student \
        --tokenizer=characters:arithmetic --layers=3 --width=48 --heads=3 --kv_heads=3
    python -m distill.main --config=configs/sft.py:arithmetic_student --workdir=runs/student

The runs took 14 and 3 minutes on two shared CPU cores and reached, on 512 held-out problems,

    teacher (1,053,440 weights)  accuracy 100.0% (99.3% - 100.0%)
    student (112,176 weights)   accuracy  42.2% (38.0% -  46.5%)
"""

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    config = default_config()
    config.distillation.hard_labels = True
    config.distillation.lambda_ = 0.0
    config.data.shuffle = True
    if arg == "":
        return config
    config.data.name = "arithmetic"
    config.policy.model_name = f"runs/random/{arg}"
    config.policy.precision = "float32"
    config.policy.max_total_sequence_length = 64
    config.distillation.generate_strategy.max_length = 48
    config.policy.optimizer.schedule = "cosine"
    config.policy.optimizer.warmup_steps = 50
    config.policy.train_global_batch_size = 64
    config.policy.train_micro_batch_size = 32
    config.evaluation.batch_size = 256
    config.checkpointing.export_dtype = "bfloat16"
    if arg == "arithmetic_teacher":
        config.policy.optimizer.learning_rate = 1e-3
        config.distillation.max_steps = 1500
        config.distillation.eval_steps = 250
        config.distillation.save_steps = 250
    elif arg == "arithmetic_student":
        # Stopped early: a student that knows the task but slips within a few steps.
        config.policy.optimizer.learning_rate = 3e-3
        config.distillation.max_steps = 700
        config.distillation.eval_steps = 250
    else:
        raise ValueError(f"argument {arg!r}: allowed are arithmetic_teacher, arithmetic_student")
    return config
