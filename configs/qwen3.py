"""Qwen3-32B teaches Qwen3-4B on pe-nlp/math-cl, without thinking.

    python -m distill.main --config=configs/qwen3.py --workdir=runs/qwen3

Hardware: of each of eight H100s, 35 GB by an estimate: `python -m distill.plan
--config=configs/qwen3.py --topology=gpu:h100x8`. Weights are split over all devices (mesh.fsdp).
With `--config=configs/qwen3.py:thinking` the chat template lets both models think first, and
responses may be four times as long: `data.template_arguments` says so.
`--config=configs/qwen3.py:long` is for 64 devices: a student of 8B thinks for up to 31,744 tokens,
and four devices share every row of 32,768 (mesh.context). It takes 51 GB of each chip of a
v5p:4x4x4, compiled: `python -m distill.plan --config=configs/qwen3.py:long --topology=v5p:4x4x4`.
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.scratch --config=configs/qwen3.py:smoke --tokenizer=bpe:400 \
        --like=configs/tiny/qwen3.json --vocab_size=416
    python -m distill.scratch --config=configs/qwen3.py:smoke --vocab_size=448 --seed=1 \
        --like=configs/tiny/qwen3.json --tokenizer=runs/random/qwen3_student \
        --output=runs/random/qwen3_teacher
    python -m distill.main --config=configs/qwen3.py:smoke --workdir=runs/qwen3_smoke

runs the same code in one to three minutes on a CPU, with tiny random models of this family.
"""

from ml_collections import ConfigDict

from distill.configs import math_cl


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "thinking", "long"):
        raise ValueError(f"argument {arg!r}: allowed are smoke, thinking, long")
    if arg == "smoke":
        return math_cl.smoke("qwen3")
    student = "Qwen/Qwen3-8B" if arg == "long" else "Qwen/Qwen3-4B"
    config = math_cl.distil("Qwen/Qwen3-32B", student)
    config.data.template_arguments = (f"enable_thinking={arg in ('thinking', 'long')}",)
    if arg == "thinking":
        config.distillation.generate_strategy.max_length = 8192
        config.policy.max_total_sequence_length = 9216
        config.policy.train_micro_batch_size = 8
    if arg == "long":
        config.distillation.generate_strategy.max_length = 31744
        config.policy.max_total_sequence_length = 32768
        config.policy.train_micro_batch_size = 64  # weights are gathered once for all rows
        config.policy.generation.cache_memory = 8.0
        config.mesh.context = 4
    return config
