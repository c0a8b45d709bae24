"""What the report says of a run in words."""

from distill.reporting.verdict import verdict


def numbers(accuracy: float, truncated: float = 0.0, forward_kl: float | None = 0.5) -> dict:
    return dict(
        accuracy=accuracy,
        accuracy_low=accuracy - 0.05,
        accuracy_high=accuracy + 0.05,
        examples=100,
        truncated=truncated,
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
