"""What `distill.preflight --probe` finds, and which configs it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import tiny_config

from distill.base.errors import UserError
from distill.build.session import open_session
from distill.checks.probe import Probe, check_probe, probe, write_probe
from distill.config.parse import parse_config
from distill.evaluation.grading import register_grader
from distill.reporting.read import read_run

LIMIT = 14


@register_grader("even")
def is_even(example, response):
    """So that most changes of a response change whether it is right."""
    return sum(map(ord, response)) % 2 == 0


def greedy_config(**distillation):
    config = tiny_config(**distillation)
    config.distillation.generate_strategy.max_length = LIMIT
    config.distillation.generate_strategy.decoding_method = "greedy"
    config.evaluation.grading = "even"
    return config


def _sharpened(models):
    """Weights as they are drawn say one token again and again."""
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, models)


def plain_responses(model, vocabulary, prompts, limits) -> list[list[int]]:
    """Greedy, by a full forward pass for every token."""
    module, found, size = nnx.merge(model.graph, model.params), [], vocabulary.size
    step = jax.jit(lambda row, end: module.logits(module(row))[0, end - 1, :size].argmax())
    for prompt, limit in zip(prompts, limits, strict=True):
        row = np.zeros((1, 80), np.int32)
        row[0, : len(prompt)] = prompt
        response: list[int] = []
        while len(response) < limit and vocabulary.tokenizer.eos_token_id not in response:
            end = len(prompt) + len(response)
            response.append(int(step(jnp.asarray(row), end)))
            row[0, end] = response[-1]
        found.append(response)
    return found


def test_accuracies_against_one_token_at_a_time(tmp_path):
    """The teacher reads a prompt of its own, and goes on from half of what the student said."""
    config = greedy_config()
    config.teacher.prompt_template = "1+{problem}"
    with open_session(parse_config(config)) as session:
        teacher = session.load_teachers()[""]
        state, params = _sharpened((session.load_state(), teacher.model.params))
        teacher.model = dataclasses.replace(teacher.model, params=params)
        said: list[str] = []
        found = probe(session, state, said.append)
        student, [teacher] = session.evaluated(state), session.teachers_at(state)
        prompts, vocabulary = session.evaluator.prompts, session.vocabulary
        theirs = [tokens.tolist() for tokens in prompts.view_tokens]
        assert all(len(a) > len(b) for a, b in zip(theirs, prompts.prompt_tokens, strict=True))
        ours = plain_responses(student, vocabulary, prompts.prompt_tokens, [LIMIT] * 8)
        own = plain_responses(teacher, vocabulary, theirs, [LIMIT] * 8)
        halves = [response[: len(response) // 2] for response in ours]
        begun = [a + b for a, b in zip(theirs, halves, strict=True)]
        rest = plain_responses(teacher, vocabulary, begun, [LIMIT - len(half) for half in halves])
    mended = [a + b for a, b in zip(halves, rest, strict=True)]
    decode = vocabulary.tokenizer.decode
    rights = [
        np.array(
            [is_even(None, decode(tokens, skip_special_tokens=True)) for tokens in each], float
        )
        for each in (ours, own, mended)
    ]
    one = found[""]
    assert len(set(map(tuple, rights))) == 3 and len(set(map(len, halves))) > 1
    assert (one.prompts, one.student, one.teacher, one.teacher_from_student) == (
        8, *(right.mean() for right in rights)
    )  # fmt: skip
    more = rights[2] - rights[0]
    margin = 1.96 * more.std() / 8**0.5
    assert (one.more_low, one.more_high) == pytest.approx(
        (more.mean() - margin, more.mean() + margin)
    )
    assert said == [f"{one.table()}\n{one.verdict}"]
    write_probe(found, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    kept = read_run(tmp_path).probe[""]
    assert kept["verdict"] == one.verdict and kept["teacher"] == one.teacher


def test_a_teacher_that_does_no_better_will_not_help():
    """The student itself goes on as the student did."""
    config = greedy_config()
    config.distillation.teacher_model_path = config.policy.model_name
    with open_session(parse_config(config)) as session:
        session.load_teachers()
        found = probe(session, session.load_state(), print)[""]
    assert found.student == found.teacher == found.teacher_from_student and not found.recovers
    assert (found.overlap, found.left, found.back) == (1.0, 0.0, None)
    assert found.entropy_p == pytest.approx(found.entropy_q, abs=1e-4)
    assert "should not help" in found.verdict


def made_up(student: float, teacher: float, from_student: float, margin: float) -> Probe:
    more = from_student - student
    return Probe(64, student, teacher, from_student, more - margin, more + margin, *[0.5] * 5)


def test_the_verdict_follows_the_interval():
    helps = made_up(0.25, 1.0, 0.75, 0.125)
    assert helps.recovers and helps.verdict == (
        "On-policy distillation should help: from the student's half-way states the teacher "
        "solves 75%, the student 25% (+50 points, 95% interval +38 to +62)."
    )
    lost = made_up(0.25, 1.0, 0.3, 0.125)
    assert not lost.recovers and "should not help: from the student's" in lost.verdict
    assert lost.verdict.endswith(
        "and 100% from its own. It does not recover from what the student writes."
    )
    assert made_up(0.3, 0.25, 0.3, 0.1).verdict.endswith("should not help: the teacher solves 25%.")
    table = helps.table().splitlines()
    assert table[0].startswith("64 held-out prompts") and "25.0%     16.0% - 36.8%" in table[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation.hard_labels": True, "distillation.lambda_": 0.0}, "has none"),
        ({"environment.name": "self_check"}, "environment.name=self_check makes dialogues"),
        ({"data.validation.max_samples": 0}, "leaves no prompt to probe"),
        (
            {"teacher.backend": "vllm", "teacher.vllm.urls": ("http://127.0.0.1:1",)},
            "only scores are known",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(changes, message):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as refused:
        check_probe(parse_config(config))
    assert "\n" not in str(refused.value)
