"""Qwen3.5-9B teaches Qwen3.5-0.8B on pe-nlp/math-cl: three layers of four are recurrent.

    python -m distill.main --config=configs/qwen35.py --workdir=runs/qwen35

Hardware: of each of eight H100s, 9.8 GB by an estimate: `python -m distill.plan
--config=configs/qwen35.py --topology=gpu:h100x8`. Weights are split over all devices (mesh.fsdp).
Of the hub's folders the text decoder is trained; vision tower and draft layers are exported
unchanged. Folders of the decoder alone, `Qwen3_5ForCausalLM`, will do too.
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.scratch --config=configs/qwen35.py:smoke --tokenizer=bpe:400 \
        --like=configs/tiny/qwen3_5.json --vocab_size=416
    python -m distill.scratch --config=configs/qwen35.py:smoke --vocab_size=448 --seed=1 \
        --like=configs/tiny/qwen3_5.json --tokenizer=runs/random/qwen35_student \
        --output=runs/random/qwen35_teacher
    python -m distill.main --config=configs/qwen35.py:smoke --workdir=runs/qwen35_smoke

runs the same code in one to three minutes on a CPU, with tiny random models of this family.
"""

from ml_collections import ConfigDict

from distill.configs import math_cl


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    if arg == "smoke":
        return math_cl.smoke("qwen35")
    return math_cl.distil("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-0.8B")
