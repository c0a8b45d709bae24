"""What the report says of a run in words."""

import pytest

from distill.reporting.verdict import verdict


def numbers(accuracy: float, truncated: float = 0.0, forward_kl: float | None = 0.5) -> dict:
    return dict(
        accuracy=accuracy,
        accuracy_low=accuracy - 0.05,
        accuracy_high=accuracy + 0.05,
        examples=100,
        truncated=truncated,
        mean_length=20.0 if truncated < 0.05 else 40.0,
        forward_kl=forward_kl,
    )


def test_intervals_decide_and_reasons_are_the_runs_own():
    base, teacher = numbers(0.4), numbers(0.9)
    better = verdict({"base": base, "student": numbers(0.6), "teacher": teacher})
    assert better == "The run helped: 40.0% before, 60.0% after, and the intervals lie apart."
    alike = verdict({"base": base, "student": numbers(0.45, forward_kl=0.25), "teacher": teacher})
    assert alike.startswith("100 prompts show no difference: 40.0% before, 45.0% after.")
    assert alike.endswith("The forward KL to the teacher fell from 0.500 to 0.250.")
    worse = verdict({"base": base, "student": numbers(0.1, 0.8), "teacher": numbers(0.42)})
    assert worse.startswith("The run did harm: 40.0% before, 10.0% after")
    assert "80% of the responses run into the length limit, before 0%" in worse
    assert "The teacher itself solves 42.0%." in worse


def test_without_accuracy_there_is_none():
    assert verdict({"base": numbers(0.4)}) == ""
    base, student = numbers(0.4, forward_kl=None), numbers(0.4, forward_kl=None)
    assert "KL" not in verdict({"base": base, "student": student})
    assert verdict({"base": base, "student": {**student, "accuracy": None}}) == ""


DEPARTURES = dict(tokens=0.12, responses=0.5, back=0.04, right=0.02, right_otherwise=0.9)
UNCHANGED = {"base": numbers(0.4), "student": numbers(0.41), "teacher": numbers(0.9)}


@pytest.mark.parametrize("recovers", [True, False])
def test_a_probe_says_whether_the_teacher_recovers(recovers):
    """Where it does not, the run is broken in a way that more data of the kind does not mend."""
    probe = dict(student=0.4, teacher_from_student=0.8 if recovers else 0.41, recovers=recovers)
    said = verdict(UNCHANGED, DEPARTURES, probe)
    assert (
        "The student leaves the path at 12.0% of tokens and comes back in 4%: the teacher" in said
    )
    if recovers:
        assert "the teacher does recover, and solves 80% from" in said
        assert said.endswith("so more on-policy data can help.")
    else:
        assert "the teacher does not recover either, and solves 41% from" in said
        assert said.endswith("so more on-policy data won't help.")


def test_without_a_probe_the_responses_are_what_is_known():
    said = verdict(UNCHANGED, DEPARTURES)
    assert "comes back in 4%; `python -m distill.preflight --probe` says" in said
    assert said.endswith("Of the responses that leave it 2% are right, of the others 90%.")
    said = verdict(UNCHANGED, DEPARTURES | dict(tokens=0.001))
    assert "The student hardly leaves the teacher's path" in said
    never = dict.fromkeys(DEPARTURES) | dict(tokens=0.02)
    assert "at 2.0% of tokens; `python" in verdict(UNCHANGED, never)
    better = verdict(UNCHANGED | {"student": numbers(0.6)}, DEPARTURES)
    assert "leaves" not in better  # a run that helped needs no reason


def test_a_reference_is_compared_with_and_growth_is_named():
    results = {"base": numbers(0.4), "student": numbers(0.6, 0.08)}
    said = verdict(results, reference=numbers(0.38))
    assert "The reference run ends at 38.0%: this one is 22.0 points above, and the" in said
    assert "intervals lie apart." in said
    assert "Responses grew from 20 to 40 tokens." in said
    assert "2.0 points below, and the intervals overlap." in verdict(
        results, reference=numbers(0.62)
    )
