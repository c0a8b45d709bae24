"""Gemma 3 27B teaches Gemma 3 4B on pe-nlp/math-cl: windows in five layers of six.

    python -m distill.main --config=configs/gemma.py --workdir=runs/gemma

Hardware: of each of eight H100s, 33 GB by an estimate: `python -m distill.plan
--config=configs/gemma.py --topology=gpu:h100x8`. Weights are split over all devices (mesh.fsdp).
Of the folders the text decoder is trained; the vision tower is exported unchanged.
Validation: MATH-500, greedy accuracy and divergences to the teacher before and after.
No result is stated here because none has been measured yet.

    python -m distill.scratch --config=configs/gemma.py:smoke --tokenizer=bpe:400 \
        --like=configs/tiny/gemma3.json --vocab_size=416
    python -m distill.scratch --config=configs/gemma.py:smoke --vocab_size=448 --seed=1 \
        --like=configs/tiny/gemma3.json --tokenizer=runs/random/gemma_student \
        --output=runs/random/gemma_teacher
    python -m distill.main --config=configs/gemma.py:smoke --workdir=runs/gemma_smoke

runs the same code in one to three minutes on a CPU, with tiny random models of this family.
"""

from ml_collections import ConfigDict

from distill.configs import math_cl


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    if arg == "smoke":
        return math_cl.smoke("gemma")
    return math_cl.distil("google/gemma-3-27b-it", "google/gemma-3-4b-it")
