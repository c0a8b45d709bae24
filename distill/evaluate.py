"""Held-out evaluation of any checkpoint: greedy accuracy, and divergences to the teacher.

python -m distill.evaluate --model=PATH --config=configs/math_cl.py
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from distill.base import processes
from distill.base.errors import UserError
from distill.base.files import write_atomically
from distill.config import cli
from distill.evaluation.evaluator import (
    format_table,
)


def main() -> None:
    config = cli.required_config(config_flag)
    if not model_flag.value:
        raise UserError("pass --model=PATH, the Hugging Face checkpoint to evaluate")
    cli.join_processes()
    from distill.trainer import evaluate_checkpoint

    results = evaluate_checkpoint(config, model_flag.value)
    print(format_table(results))
    if output_flag.value and processes.is_first():
        write_atomically(Path(output_flag.value), json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    config_flag = cli.define_config_flag()
    model_flag = flags.DEFINE_string("model", None, "Folder or hub id of the model to evaluate.")
    output_flag = flags.DEFINE_string("output", None, "JSON file for the results.")
    cli.run(main)
