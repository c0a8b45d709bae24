"""The folder of a run that never was, for tests of the report: texts are as hostile as can be."""

import json
import math
from pathlib import Path

from distill.evaluation.diagnosis import CLASSES

HOSTILE = '</script><img src=x onerror="window.hacked=1"><!-- {{DATA}} $& \u202eevil\u2066 \x1b[31m'


def write_run(
    folder: Path, *, steps: int = 40, max_steps: int = 40, wrong: int = 2, has_teacher: bool = True
) -> Path:
    """A run of 6 shown responses, of which the first `wrong` are wrong; by default finished."""
    folder.mkdir(parents=True)
    lines = [_evaluated(0, "base", 0.4), _evaluated(0, "teacher", 1.0)]
    lines += [_logged(step) for step in range(10, steps + 1, 10)]
    if steps == max_steps:
        lines.append(_evaluated(steps, "student", 0.8))
        (folder / "student").mkdir()
        roles = {"base": 0.4, "student": 0.8, "teacher": 1.0}
        results = {role: _evaluation(accuracy) for role, accuracy in roles.items()}
        (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "distillation.max_steps": max_steps,
        "distillation.kl_type": "forward",
        "policy.model_name": HOSTILE,
        "seed": 0,
    }
    facts = {"config": config, "environment": {"devices": "1 x cpu", "jax": "0.10.2"}}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "rollouts").mkdir()
    for role, step in (("base", 0), ("student", steps)):
        record = _rollouts(role, step, wrong if role == "student" else 5)
        if not has_teacher:
            record["has_teacher"] = False
            for response in record["responses"]:
                del response["divergence"], response["log_p"], response["top"]
        (folder / "rollouts" / f"{role}.json").write_text(json.dumps(record))
    return folder


def _logged(step: int) -> dict:
    return {
        "step": step,
        "loss": 1.0 / step,
        "log_prob_gap": 1e-6,
        "response_length": 20.0,
        "tokens_per_second/total": 1000.0,
        "seconds/step": 0.5,
        "grad_norm": None,
    }


def _evaluation(accuracy: float) -> dict:
    return dict(
        accuracy=accuracy, accuracy_low=accuracy - 0.05, accuracy_high=min(1.0, accuracy + 0.05),
        examples=100, forward_kl=1 - accuracy, reverse_kl=2 - 2 * accuracy, mean_length=21.5,
        truncated=0.0,
    )  # fmt: skip


def _evaluated(step: int, role: str, accuracy: float) -> dict:
    return {"step": step, **{f"eval/{role}/{k}": v for k, v in _evaluation(accuracy).items()}}


def _rollouts(role: str, step: int, wrong: int) -> dict:
    texts = {"5": "five", "6": HOSTILE, "7": "\n"}
    responses = []
    for i in range(6):
        tokens = ["five", " and\n", HOSTILE, "", "é"]
        divergence = [0.01 * i, 0.2, 1.5, 0.0, 0.001]
        log_q = [math.log(0.9), -0.5, math.log(0.6), 0.0, -0.1]
        log_p = [math.log(0.7), -0.6, math.log(0.2), 0.0, -0.1]
        top = [
            [[5, log_p[0], log_q[0]], [6, math.log(0.2), math.log(0.05)], [7, -9.0, -12.0]],
            [[7, -0.1, -0.8], [5, -3.0, -2.0], [6, -4.0, -4.0]],
            [[5, math.log(0.75), math.log(0.3)], [6, log_p[2], log_q[2]], [7, -3.0, -3.0]],
            [[5, 0.0, 0.0], [6, -20.0, -20.0], [7, -20.0, None]],
            [[7, -0.1, -0.1], [5, -3.0, -2.0], [6, -4.0, -4.0]],
        ]
        responses.append(
            dict(
                id=f"example-{i}", question=f"question {i} {HOSTILE}", prompt=f"<q>{i}\n{HOSTILE}",
                expected=HOSTILE, ids=[5, 9, 6, 5, 7],
                correct=i >= wrong, stopped=i != 3, tokens=tokens, divergence=divergence,
                log_q=log_q, log_p=log_p, top=top,
            )
        )  # fmt: skip
    return dict(
        role=role,
        step=step,
        responses_in_all=100,
        has_teacher=True,
        responses=responses,
        texts=texts,
        diagnosis=_diagnosis(0.12 if role == "base" else 0.08),
    )


def _diagnosis(left: float) -> dict:
    means = dict(surprise=0.5, entropy_p=0.1, entropy_q=0.4, overlap=0.6, mass_p=0.99, mass_q=0.875)
    return dict(
        tokens=500,
        responses=100,
        means=means,
        positions=dict(
            start=[0, 1, 2],
            tokens=[100, 100, 50],
            **{name: [value, 2 * value, value] for name, value in means.items()},
            loss=[0.25, 0.5, 0.25],
            left=[left, 2 * left, None],
        ),
        classes={
            name: dict(tokens=0.25, loss=share)
            for name, share in zip(CLASSES, (0.1, 0.2, 0.3, 0.4), strict=True)
        },
        prompts=dict(half=0.125, largest=[dict(number=3, loss=0.3, question=HOSTILE)]),
        departures=dict(tokens=left, responses=0.5, back=0.04, right=0.02, right_otherwise=0.9),
    )


def write_probe(folder: Path, recovers: bool) -> None:
    found = dict(
        prompts=64, student=0.3, teacher=1.0, teacher_from_student=0.9 if recovers else 0.31,
        overlap=0.6, entropy_p=0.1, entropy_q=0.4, recovers=recovers, verdict=f"says {HOSTILE}",
    )  # fmt: skip
    (folder / "probe.json").write_text(json.dumps({"": found}))
