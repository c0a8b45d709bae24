"""A teacher with another tokenizer: Llama-3.1-8B-Instruct teaches Qwen2.5-1.5B-Instruct, on-policy.

    python -m distill.main --config=configs/llama_teacher.py --workdir=runs/llama_teacher

Each model reads prompts in its own chat template. Where both tokenizers cut the same bytes, the
divergence is of the strings that both have; elsewhere a span's log-probability is an advantage.
`--config.teacher.alignment=dense` leaves these spans out.
Hardware: one 80 GB GPU, or four TPU v5e chips, by the sizes of the models.
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.scratch --config=configs/llama_teacher.py:smoke --tokenizer=bpe:400
    python -m distill.scratch --config=configs/llama_teacher.py:smoke --tokenizer=bpe:320 --seed=1 \
        --like=configs/tiny/llama.json --output=runs/random/llama_teacher_teacher
    python -m distill.main --config=configs/llama_teacher.py:smoke \
        --workdir=runs/llama_teacher_smoke

runs the same code in one to three minutes on a CPU, with tiny random models and tokenizers of two
sizes.
"""

from ml_collections import ConfigDict

from distill.configs import math_cl


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    if arg == "smoke":
        config = math_cl.smoke("llama_teacher")
        config.policy.max_total_sequence_length = 224  # fewer merges: prompts of more tokens
    else:
        config = math_cl.distil("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct")
    config.distillation.kl_type = "reverse"  # which the spans estimate, too
    config.teacher.alignment = "spans"
    return config
