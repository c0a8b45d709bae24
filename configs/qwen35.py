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
    python -m distill.scratch --config=configs/qwen35.py:smoke --tokenizer=bpe:400 --seed=1 \
        --like=configs/tiny/qwen3_5.json --vocab_size=448 --output=runs/random/qwen35_teacher
    python -m distill.main --config=configs/qwen35.py:smoke --workdir=runs/qwen35_smoke

runs the same code in minutes on a CPU, with tiny random models of this family.
"""

from pathlib import Path

from ml_collections import ConfigDict

from distill.config import default_config


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"argument {arg!r}: allowed is smoke")
    config = default_config()
    config.distillation.teacher_model_path = "Qwen/Qwen3.5-9B"
    config.distillation.kl_type = "forward"
    config.distillation.lambda_ = 1.0
    config.distillation.max_steps = 1000
    config.distillation.eval_steps = 100
    config.distillation.save_steps = 100
    config.distillation.generate_strategy.max_length = 2048
    config.policy.model_name = "Qwen/Qwen3.5-0.8B"
    config.policy.max_total_sequence_length = 3072
    config.policy.train_global_batch_size = 64
    config.policy.train_micro_batch_size = 32
    config.policy.sequence_packing.enabled = True
    config.policy.activation_checkpointing = "full"
    config.data.name = "math_cl"
    config.data.validation.split = "math500"
    config.data.validation.max_samples = 500
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return _shrink(config) if arg == "smoke" else config


def _shrink(config: ConfigDict) -> ConfigDict:
    config.distillation.teacher_model_path = "runs/random/qwen35_teacher"
    config.distillation.max_steps = 4
    config.distillation.eval_steps = 2
    config.distillation.save_steps = 2
    config.distillation.logging_steps = 1
    config.distillation.generate_strategy.max_length = 24
    config.policy.model_name = "runs/random/qwen35_student"
    config.policy.max_total_sequence_length = 160
    config.policy.train_global_batch_size = 8
    config.policy.train_micro_batch_size = 4
    config.data.path = str(Path(__file__).resolve().parents[1] / "tests/data/math_cl.jsonl")
    config.data.holdout_fraction = 0.25
    config.data.validation.split = "validation"
    config.data.validation.max_samples = 8
    config.evaluation.batch_size = 8
    config.mesh.data, config.mesh.fsdp = -1, 1
    return config
