"""Writes a model's responses to JSONL, to be used as fixed data (lambda_ < 1, or SFT on them).

    python -m distill.generate --config=configs/gsm8k.py --output=runs/teacher.jsonl
    python -m distill.generate --config=configs/gsm8k.py --output=runs/scores --scores

The model is the teacher unless --model names another; `data.name=jsonl data.path=FILE` reads the
lines. Responses cut off at the limit are marked `truncated`, and trained on without an end token;
`data.keep_truncated=False` leaves them out there. A command that was stopped goes on where it was.

With --scores, the folder gets what the teacher says of the data's own responses. Runs on these data
with `teacher.scores=FOLDER` read that at every step, and load no teacher.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from distill.base import processes
from distill.base.files import check_output, local_path
from distill.config import cli
from distill.config.method import OF_STUDENT
from distill.config.parse import default_config, parse_config
from distill.run.interrupts import Interrupts


def generate(config: ConfigDict, model: str, output: str | Path) -> dict[str, int]:
    """Responds to every prompt of `data` num_generations times.

    Args:
      config: data, generate_strategy, teacher.precision and seed are used; nothing is learned, so
        objective, rewards and what teachers are like play no part.
      model: folder or hub id of the model that responds.
      output: JSONL file, which appears when it is complete.

    Returns {'written': lines, 'truncated': those cut off at the limit}.
    """
    from distill.build.fixed_data import write_responses  # late: flags come before JAX
    from distill.build.session import open_session

    config, plain = config.copy_and_resolve_references(), default_config()
    repeats = config.distillation.generate_strategy.num_generations
    plain.teacher.precision = config.teacher.precision
    config.update(reward=plain.reward, teacher=plain.teacher)
    with config.unlocked():
        config.teachers = plain.teachers
    objective = plain.distillation.objective
    config.distillation.update(
        hard_labels=True, lambda_=0.0, teacher_model_path=model, objective=objective
    )
    config.distillation.generate_strategy.num_generations = 1
    config.policy.update(model_name=model, router_replay="off")
    path = local_path(output)
    processes.from_first(lambda: check_output(path))
    with open_session(parse_config(config), trains=False) as session:
        return write_responses(session, path, repeats)


def score(config: ConfigDict, output: str | Path) -> int:
    """Has the teacher score the data's responses, to the folder `output`; returns their tokens.

    The folder appears when it is complete, and takes the place of an older one.
    """
    from distill.build.fixed_data import write_scores  # late: flags come before JAX
    from distill.build.session import open_session

    config = config.copy_and_resolve_references()
    config.distillation.lambda_ = 0.0
    for section in (config.teacher, *config.teachers.values()):
        if "scores" in section:
            section.scores = ""
    path = local_path(output)
    with open_session(parse_config(config), trains=False) as session:
        return write_scores(session, path)


def run() -> None:
    config_flag = cli.define_config_flag()
    scores = flags.DEFINE_bool("scores", False, "Write the teacher's scores of the data instead.")
    model = flags.DEFINE_string("model", None, "Folder or hub id; default: the teacher.")
    output = flags.DEFINE_string("output", None, "JSONL file or, of scores, folder to write.")

    def main() -> None:
        config = cli.required_config(config_flag)
        if scores.value:
            if model.value or not output.value:
                raise cli.UserError("--scores takes --output=FOLDER, and the config's teacher")
            with Interrupts():
                cli.join_processes()
                tokens = score(config, output.value)
            print(f"{output.value}: scores of {tokens} tokens; set teacher.scores={output.value}")
            return
        responder = model.value or config.distillation.teacher_model_path
        if responder in OF_STUDENT:
            responder = config.policy.model_name
        if not responder:
            raise cli.UserError("pass --model=PATH: the config names no teacher_model_path")
        if not output.value:
            raise cli.UserError("pass --output=FILE.jsonl")
        with Interrupts():  # nothing is held: a signal ends the command, which is on the disk
            cli.join_processes()
            counts = generate(config, responder, output.value)
        print(f"{output.value}: {counts['written']} responses, {counts['truncated']} cut off")

    cli.run(main)


if __name__ == "__main__":
    run()
