"""Held-out evaluation of any checkpoint: greedy accuracy, and divergences to the teacher.

python -m distill.evaluate --model=PATH --config=configs/math_cl.py
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.files import check_output, local_path, to_json, write_atomically
from distill.config import cli
from distill.config.parse import parse_config


def evaluate_checkpoint(config: ConfigDict, model: str) -> dict[str, dict[str, Any]]:
    """Evaluates any Hugging Face checkpoint, and the config's teacher if it names one.

    Returns:
      {'student': evaluation fields, 'teacher': evaluation fields}.
    """
    from distill.build.evaluation import evaluate_models  # late: flags come before JAX
    from distill.build.session import open_session

    config = config.copy_and_resolve_references()
    config.policy.model_name = model
    with open_session(parse_config(config), trains=False) as session:
        return evaluate_models(session)


def run() -> None:
    config_flag = cli.define_config_flag()
    model = flags.DEFINE_string("model", None, "Folder or hub id of the model to evaluate.")
    output = flags.DEFINE_string("output", None, "JSON file for the results.")

    def main() -> None:
        config = cli.required_config(config_flag)
        if not model.value:
            raise cli.UserError("pass --model=PATH, the Hugging Face checkpoint to evaluate")
        path = local_path(output.value or ".")
        cli.join_processes()
        if output.value:
            processes.from_first(lambda: check_output(path))
        from distill.evaluation.table import format_table

        results = evaluate_checkpoint(config, model.value)
        print(format_table(results))
        if output.value and processes.is_first():
            write_atomically(path, to_json(results, indent=2) + "\n")

    cli.run(main)


if __name__ == "__main__":
    run()
