"""A mixture of experts teaches a dense model: Qwen3-30B-A3B teaches Qwen3-1.7B on pe-nlp/math-cl.

    python -m distill.main --config=configs/moe.py --workdir=runs/moe

Hardware: four 80 GB GPUs or TPU v5p chips, or a multiple of four. The weights are split over all
devices, and tokens go to the experts (mesh.expert). On 8 H200, `distill.plan` counts 7.6 GB of
teacher and 18 GB in all for each, and 205 GB sent per update; with mesh.expert=1 it is 524 GB.
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.scratch --config=configs/moe.py:smoke --tokenizer=bpe:400 --width=32
    python -m distill.scratch --config=configs/moe.py:smoke --like=configs/tiny/qwen3_moe.json \
        --tokenizer=runs/random/moe_student --seed=1 --output=runs/random/moe_teacher
    python -m distill.main --config=configs/moe.py:smoke --workdir=runs/moe_smoke

runs the same code in one to three minutes on a CPU: tiny random models, and a local JSONL with
math-cl's columns.
"""

from ml_collections import ConfigDict

from distill.configs import math_cl


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    if arg == "smoke":
        config = math_cl.smoke("moe")
    else:
        config = math_cl.distil("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-1.7B")
        config.policy.train_micro_batch_size = 8
        config.mesh.expert = 4
    config.distillation.kl_type = "reverse"
    return config
