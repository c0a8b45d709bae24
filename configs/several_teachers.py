"""Two teachers on the built-in task, each asked about levels of its own; the student is held, too.

    python -m distill.main --config=configs/several_teachers.py --workdir=runs/several_teachers

Easy problems ask the built-in teacher in bfloat16, hard ones ask it in float32: there is one such
model, and what each may cost is the point here. `anchor` is what the student was, asked about all
prompts with a small weight. On the command line, a teacher's keys are written like any others:

    python -m distill.main --config=configs/several_teachers.py --workdir=runs/several_teachers \
        --config.teachers.hard.offload=host --config.teachers.anchor.weight=0.2

Minutes on a CPU. Greedy accuracy on 512 held-out problems, with 95% intervals:

    student  94.1% (91.8% - 95.9%)  from 42.2% (38.0% - 46.5%)

That is what one teacher for all levels gives, too (configs/arithmetic.py: 94.7%), with forward KLs
of 0.008 to `easy` and 0.021 to `hard`.

    python -m distill.main --config=configs/several_teachers.py:smoke \
        --workdir=runs/several_teachers_smoke

makes two updates with two of the teachers.
"""

from ml_collections import ConfigDict

from distill.configs import arithmetic


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    config = arithmetic.get_config()
    config.distillation.teacher_model_path, config.teacher.precision = "", "bfloat16"
    built_in = "embedded:arithmetic-teacher"
    config.teachers = {
        "easy": dict(model=built_in, prompts=("level=1", "level=2")),
        "hard": dict(
            model=built_in,
            precision="float32",
            prompts=("level=3", "level=4", "level=5", "level=6"),
        ),
        "anchor": dict(model="start", precision="float32", weight=0.05),
    }
    if arg == "smoke":
        del config.teachers["anchor"]
        config.distillation.update(max_steps=2, eval_steps=0, save_steps=0, logging_steps=1)
        config.policy.train_global_batch_size = config.policy.train_micro_batch_size = 16
        config.data.max_samples = 30_000  # the first three of six levels
        config.data.validation.max_samples = config.evaluation.batch_size = 16
    return config
