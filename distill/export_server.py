"""Writes the folder from which a vLLM server for rollouts is started.

python -m distill.export_server --config=configs/math_cl.py --output=serve/student

The folder holds policy.model_name (or --model) in policy.precision, with an output head of its own
and without padding rows: what refits will replace.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from distill.base.files import local_path
from distill.config import cli
from distill.config.parse import parse_config


def export_server(config: ConfigDict, output: str | Path, model: str | None = None) -> Path:
    """Writes the student of a config for vLLM.

    Args:
      config: of the run that the server will sample for.
      output: folder to write, replaced if it holds an earlier export.
      model: folder or hub id; default: the config's.
    """
    from distill.build.sampler import build_export  # late: flags come before JAX
    from distill.build.session import open_session

    config = config.copy_and_resolve_references()
    config.policy.model_name = model or config.policy.model_name
    output = local_path(output)
    with open_session(parse_config(config), trains=False) as session:
        folder, policy = session.student_folder, session.config.policy
        export = build_export(policy, folder, session.vocabulary)
        export.write(output, session.load_frozen(folder, policy.precision).params)
    return output


def run() -> None:
    config_flag = cli.define_config_flag()
    model = flags.DEFINE_string("model", None, "Folder or hub id; default: the config's.")
    output = flags.DEFINE_string("output", None, "Folder to write.")

    def main() -> None:
        config = cli.required_config(config_flag)
        if not output.value:
            raise cli.UserError("pass --output=FOLDER, which the server will be started from")
        cli.join_processes()
        print(f"start vLLM with: --model {export_server(config, output.value, model.value)}")

    cli.run(main)


if __name__ == "__main__":
    run()
