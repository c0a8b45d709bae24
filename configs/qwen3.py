"""Qwen3-32B teaches Qwen3-4B on pe-nlp/math-cl, without thinking.

    python -m distill.main --config=configs/qwen3.py --workdir=runs/qwen3

Hardware: of each of eight H100s, 35 GB by an estimate: `python -m distill.plan
--config=configs/qwen3.py --topology=gpu:h100x8`. Weights are split over all devices (mesh.fsdp).
With `--config=configs/qwen3.py:thinking` the chat template lets both models think first, and
responses may be four times as long: `data.template_arguments` says so.
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
    if arg not in ("", "smoke", "thinking"):
        raise ValueError(f"argument {arg!r}: allowed are smoke, thinking")
    if arg == "smoke":
        return math_cl.smoke("qwen3")
    config = math_cl.distil("Qwen/Qwen3-32B", "Qwen/Qwen3-4B")
    config.data.template_arguments = (f"enable_thinking={arg == 'thinking'}",)
    if arg == "thinking":
        config.distillation.generate_strategy.max_length = 8192
        config.policy.max_total_sequence_length = 9216
        config.policy.train_micro_batch_size = 8
    return config
