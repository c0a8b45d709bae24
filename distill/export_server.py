"""Writes the folder from which a vLLM server for rollouts is started.

python -m distill.export_server --config=configs/math_cl.py --output=serve/student

The folder holds policy.model_name (or --model) in policy.precision, with an output head of its own
and without padding rows: what refits will replace.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from distill.base.errors import UserError
from distill.build.data import build_vocabulary
from distill.build.devices import build_mesh
from distill.build.models import build_frozen_model, find_models
from distill.build.servers import build_export
from distill.config import cli
from distill.config.parse import parse_config


def export_server(config: ConfigDict, output: str | Path, model: str | None = None) -> Path:
    """Writes the student of a config for vLLM.

    Args:
      config: of the run that the server will sample for.
      output: folder to write, replaced if it holds an earlier export.
      model: folder or hub id; default: the config's.

    Raises:
      UserError: the model cannot be read, or is made by the run itself (then give `model`).
    """
    config = config.copy_and_resolve_references()
    if model:
        config.policy.model_name = model
    if not config.policy.model_name:
        raise UserError(
            "policy.model_name is empty, as the run makes its student itself: pass --model=FOLDER "
            "(WORKDIR/scratch/student/initial), or let the run start the server "
            "(policy.generation.vllm.python)"
        )
    parsed = parse_config(config)
    mesh = build_mesh(parsed)
    output = Path(output).expanduser().absolute()
    with jax.set_mesh(mesh):
        student_folder, teacher_folder = find_models(parsed)
        vocabulary = build_vocabulary(student_folder, teacher_folder)
        precision = parsed.policy.precision
        student = build_frozen_model(parsed, student_folder, mesh, precision)
        build_export(parsed.policy, student_folder, vocabulary).write(output, student.params)
    return output


def main() -> None:
    config = cli.required_config(config_flag)
    if not output_flag.value:
        raise UserError("pass --output=FOLDER, which the server will be started from")
    cli.join_processes()
    folder = export_server(config, output_flag.value, model_flag.value)
    print(f"start vLLM with: --model {folder}")


if __name__ == "__main__":
    config_flag = cli.define_config_flag()
    model_flag = flags.DEFINE_string("model", None, "Folder or hub id; default: the config's.")
    output_flag = flags.DEFINE_string("output", None, "Folder to write.")
    cli.run(main)
