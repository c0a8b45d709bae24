"""benchmarks/evidence.py: its runs are what they say, and its tables what the numbers say."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from benchmarks import evidence, evidence_report
from benchmarks.evidence_examination import Examination
from benchmarks.evidence_measures import (
    DistinctProblems,
    accuracies,
    departures,
    positions,
    training_numbers,
)
from benchmarks.evidence_methods import (
    BATCH,
    CACHED,
    KEPT,
    METHODS,
    MORE_UPDATES,
    SMALL_BUDGET,
    SMALL_STUDENT,
    UPDATES,
    Run,
    all_runs,
)
from configs import arithmetic, sft
from distill.base.errors import UserError
from distill.config.parse import parse_config
from distill.evaluation.grading import wilson_interval

RUNS = [run for run in all_runs(1) if run.method != "base"]


def parsed(config, overrides: dict):
    config.update_from_flattened_dict({k: v for k, v in overrides.items() if v is not None})
    return parse_config(config)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_is_a_config_of_its_method(run):
    paths = {"policy.model_name": "student", "data.path": "answers.jsonl"}
    config = parsed(arithmetic.get_config(), {**run.overrides(run.updates), **paths})
    distillation = config.distillation
    # Only a run that is on-policy samples, only one with a teacher has soft labels.
    assert (distillation.lambda_ > 0) == ("on_policy" in run.method or "mix" in run.method)
    assert distillation.hard_labels != METHODS[run.method].has_teacher
    divergence = run.method.removesuffix("_cached").rpartition("_")[2]
    assert not METHODS[run.method].has_teacher or distillation.kl_type == divergence
    assert config.policy.train_global_batch_size == BATCH
    assert distillation.max_steps == run.updates


def test_the_small_student_is_a_config_too():
    config = parsed(sft.get_config("arithmetic_student"), SMALL_STUDENT)
    assert config.distillation.hard_labels and config.distillation.eval_steps == 0


def test_budgets():
    assert len({run.name for run in all_runs(3)}) == len(all_runs(3))
    for run in RUNS:
        seen = run.updates * BATCH
        if run.budget in ("updates", "long", "rate"):
            updates = MORE_UPDATES if run.budget == "long" else UPDATES
            assert (run.updates, run.prompts) == (updates, seen)
            continue
        # The same number of answers is scored, once, or generated, once.
        assert run.prompts == {"teacher": UPDATES, "small": SMALL_BUDGET}[run.budget] * BATCH
        assert (seen > run.prompts) == (run.method in KEPT)
        assert run.budget == "small" or run.method in KEPT
    methods = Counter(run.method for run in all_runs(3) if run.student == "112k")
    assert methods["self_training"] == 3 and methods["on_policy_jsd"] == 3 + 1
    assert methods[CACHED] == 3 + 1 and methods["on_policy_forward"] == 3 + 1 + 1 + 2


def test_only_right_answers_are_kept(tmp_path):
    line = {"id": "0", "prompt": "2+3*4", "answer": "20"}
    responses = ["2+3=5\n5*4=20", "2+3=5\n5*4=21", "20=2", ""]
    lines = [json.dumps({**line, "response": response}) for response in responses]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    path = evidence.keep_right(tmp_path / "answers.jsonl", tmp_path / "right.jsonl")
    assert [json.loads(x)["response"] for x in path.read_text().splitlines()] == responses[:1]


def test_no_held_out_problem_counts_twice():
    problems = DistinctProblems()
    prompts = [problems[i].prompt for i in range(len(problems))]
    assert len(set(prompts)) == len(prompts) < 2000
    assert {problems.level(i) for i in range(len(problems))} == {1, 2, 3, 4, 5, 6}
    assert all(len(p) == 1 + 2 * problems.level(i) for i, p in enumerate(prompts))


@pytest.fixture
def examination():
    """Three answers of 3, 10 and 9 tokens; the second departs at 8, the third at 0 and 5."""
    shape = (3, 48)
    departs_br = np.zeros(shape, bool)
    departs_br[1, 8] = departs_br[2, 0] = departs_br[2, 5] = True
    valid_br = np.arange(48) < np.array([3, 10, 9])[:, None]
    return Examination(
        forward_kl_br=valid_br * 0.5,
        reverse_kl_br=valid_br * 1.0,
        teacher_log_prob_br=valid_br * np.where(np.arange(48) < 8, -0.25, -2.0),
        departs_br=departs_br,
        overlap_br=valid_br * 1.0,
    )


LENGTHS = np.array([3, 10, 9])


def test_departures(examination):
    found = departures(examination, LENGTHS, np.array([True, True, False]))
    assert found["kept"] == [3, 1, 0, 0, 0, 0]
    assert found["departed"] == [1, 1, 0, 0, 0, 0]
    assert found["departed_right"] == [0, 1, 0, 0, 0, 0]
    # Up to the first departure: 3, 9 and 1 tokens.
    assert (found["before_tokens"], found["after_tokens"]) == (13, 9)
    assert (found["before_kl"], found["after_kl"]) == (6.5, 4.5)


def test_positions_and_levels(examination):
    found = positions(examination, LENGTHS)
    assert found["position_tokens"] == [19, 3, 0, 0, 0, 0]
    assert found["position_surprise"] == [19 * 0.25, 3 * 2.0, 0, 0, 0, 0]
    found = accuracies(np.array([True, True, False]), np.array([1, 3, 3]))
    assert found == {"right": [1, 0, 1, 0, 0, 0], "count": [1, 0, 2, 0, 0, 0]}


def test_tokens_and_seconds_of_a_run(tmp_path):
    (tmp_path / "training").mkdir()
    steps = [
        {"step": 0, "eval/base/accuracy": 0.5},
        {"step": 1, "tokens": 100.0, "on_policy": 0.0, "seconds/step": 3.0},
        {"step": 2, "tokens": 60.0, "on_policy": 1.0, "seconds/step": 1.0},
        {"step": 3, "tokens": 40.0, "on_policy": 1.0, "seconds/step": 1.5},
    ]
    (tmp_path / "training/metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    (tmp_path / "commands.jsonl").write_text('{"wall": 5.0, "cpu": 8.0}\n{"wall": 1.0, "cpu": 2.0}')
    run = Run("112k", "mix_forward", "updates", 0, 3, 3)
    assert training_numbers(tmp_path, run, []) == {
        "sampled_tokens": 100,
        "teacher_scored": 200,
        "teacher_generated": 0,
        "seconds": {"wall": 6.0, "cpu": 10.0},
        "seconds_per_update": 1.5,
    }
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"response": "2+2=4"}\n{"response": "1"}\n{"response": "not counted"}\n')
    found = training_numbers(tmp_path, Run("112k", "sequence_kd", "updates", 0, 3, 2), [answers])
    assert (found["teacher_scored"], found["teacher_generated"]) == (0, 8)
    # Two of three answers, which took the seconds of the same folder.
    assert found["seconds"] == pytest.approx({"wall": 6.0 + 4.0, "cpu": 10.0 + 20 / 3})
    found = training_numbers(tmp_path, Run("112k", "self_training", "updates", 0, 3, 1), [answers])
    # Four answers, of which three ended, with 6, 2 and 12 tokens.
    assert (found["teacher_generated"], found["sampled_tokens"]) == (0, 100 + 20 + 48)


def make_row(method: str, seed: int, right: int, **changes) -> dict:
    per_level = {"right": [right, 0, 0, 0, 0, 0], "count": [95, 5, 5, 5, 5, 5]}
    kinds = {
        **per_level,
        "tokens": 1000,
        "forward_kl": 50.0,
        "reverse_kl": 100.0,
        "overlap": 900.0,
        "position_tokens": [600, 400, 0, 0, 0, 0],
        "position_surprise": [60.0, 80.0, 0, 0, 0, 0],
        "kept": [100, 50, 0, 0, 0, 0],
        "departed": [10, 20, 0, 0, 0, 0],
        "departed_right": [3, 0, 0, 0, 0, 0],
        **{"before_kl": 40.0, "before_tokens": 800, "after_kl": 10.0, "after_tokens": 100},
    }
    row = {
        **vars(Run("112k", method, "updates", seed, UPDATES, UPDATES * BATCH)),
        **dict(teacher_scored=2000, teacher_generated=0, sampled_tokens=0, seconds_per_update=0.5),
        **dict(seconds={"wall": 60.0, "cpu": 100.0}),
        **{kind: kinds for kind in ("greedy", "sampled", "on_teacher_answers")},
    }
    return {**row, **changes}


@pytest.fixture
def rows():
    return [
        make_row("base", 0, 30),
        *(make_row("off_policy_forward", seed, right) for seed, right in enumerate((40, 50, 60))),
        *(make_row("on_policy_forward", seed, right) for seed, right in enumerate((60, 90, 75))),
        make_row("on_policy_forward", 0, 6, student="33k"),
    ]


def lines_of(tables: dict[str, str], name: str) -> list[list[str]]:
    return [re.split(" {2,}", line.strip()) for line in tables[name].splitlines()]


def test_tables_say_what_the_rows_say(rows):
    tables = evidence_report.make_tables(rows)
    accuracy = {line[0]: line[1:] for line in lines_of(tables, "accuracy 112k updates")}
    low, high = wilson_interval(75, 120)
    found = accuracy["on-policy forward KL"]
    assert found[:3] == ["62.5%", f"{low:.1%} - {high:.1%}", "50.0% - 75.0%"]
    assert found[4:] == ["0.0500", "0.1000", "0.0500"]
    levels = {line[0]: line[1:] for line in lines_of(tables, "levels 112k")}
    low, high = wilson_interval(50, 95)
    assert levels["off-policy forward KL"][0] == f"52.6 ({100 * low:.1f} - {100 * high:.1f})"
    gains = {line[0]: line[1:] for line in lines_of(tables, "gain 112k updates")}
    # From 25% to 62.5%, off-policy to 41.7%; seeds: 30/10, 60/20, 45/30 right answers more.
    assert gains["on-policy forward KL"] == ["+37.5", "2.25 (1.50 - 3.00)"]
    answer = lines_of(tables, "answer")[1]
    # All are on level 1, of 285 problems: 225 and 150 right ones.
    assert answer[:6] == ["112k, equal updates", "41.7%", "62.5%", "+20.8", "+8.8", "+0.0"]
    assert answer[6:] == ["2.25 (1.50 - 3.00)", "1.0"]
    departed = {line[0]: line[1:] for line in lines_of(tables, "departures 112k")}
    assert departed["off-policy forward KL"] == [
        "10.0%",
        "40.0%",
        "-",
        "-",
        "-",
        "-",
        "10.0%",
        "0.0500",
        "0.1000",
    ]
    perplexity = {line[0]: line[1:] for line in lines_of(tables, "perplexity 112k")}
    assert perplexity["student as it comes"] == [
        "1.105",
        "1.221",
        "-",
        "-",
        "-",
        "-",
        "1.150",
        "90.0%",
    ]


def test_kept_scores_are_counted_once(rows):
    kept = make_row(CACHED, 0, 70, budget="teacher", prompts=UPDATES * BATCH // 4)
    tables = evidence_report.make_tables([*rows, {**kept, "teacher_scored": 400_000}])
    cost = {line[0]: line[1:] for line in lines_of(tables, "cost 112k teacher")}
    assert cost[METHODS[CACHED].title][2] == "100k"


def test_a_page_without_a_place_for_a_table_is_refused():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert evidence_report.fill(page, {"x": "new"}) == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    with pytest.raises(UserError, match="one place for the table y"):
        evidence_report.fill(page, {"y": "new"})


def test_the_committed_page_has_the_committed_numbers():
    page = (evidence_report.DOCS / "results.md").read_text()
    rows = json.loads(evidence_report.ROWS.read_text())
    assert evidence_report.fill(page, evidence_report.make_tables(rows)) == page


def test_plots_are_the_same_for_the_same_numbers(rows, tmp_path):
    from benchmarks.evidence_plots import make_plots

    for folder in ("a", "b"):
        make_plots(rows, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["evidence-accuracy.svg", "evidence-levels.svg", "evidence-positions.svg"]
    for name in names:
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        assert "112k weights" in text
