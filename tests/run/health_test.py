"""Signs that a run is going wrong: each is made to happen."""

import json

import pytest

from distill.config.schema import Warn
from distill.run.health import Health

FINE = {
    "loss": 1.0,
    "generation/mean_length": 20.0,
    "generation/truncated": 0.1,
    "generation/repetition": 0.1,
    "generation/entropy_estimate": 0.5,
}


def after_fine_steps(count: int = 20, **limits) -> Health:
    health = Health(Warn(**limits), quiet_steps=5)
    for step in range(1, count + 1):
        assert health.check(step, FINE) == []
    return health


@pytest.mark.parametrize(
    ("kind", "metric", "bad"),
    [
        ("loss_spike", "loss", 5.1),
        ("length_spike", "generation/mean_length", 41.0),
        ("truncated", "generation/truncated", 0.6),
        ("truncated_rise", "generation/truncated", 0.4),
        ("repetition", "generation/repetition", 0.6),
        ("low_entropy", "generation/entropy_estimate", 0.01),
    ],
)
def test_each_kind_is_seen_and_0_switches_it_off(kind, metric, bad):
    limits = {"low_entropy": 0.05} | ({"truncated_rise": 0.0} if kind == "truncated" else {})
    (line,) = after_fine_steps(**limits).check(21, FINE | {metric: bad})
    assert f"WARNING: step 21: {metric} is {bad:.4g}" in line and f"logger.warn.{kind}" in line
    assert after_fine_steps(**limits | {kind: 0.0}).check(21, FINE | {metric: bad}) == []


def test_a_slow_rise_is_seen_after_a_resume_too():
    """The usual share rises with it; what it was at first is in the checkpoint."""
    health = after_fine_steps(100)
    resumed = Health(Warn(), quiet_steps=5)
    resumed.restore(json.loads(json.dumps(health.state())))
    shares = [0.1 + 0.01 * i for i in range(39)]
    seen = [
        s
        for i, s in enumerate(shares)
        if resumed.check(101 + i, FINE | {"generation/truncated": s})
    ]
    assert seen[0] == pytest.approx(0.36) and len(seen) == 3


def test_one_kind_is_silent_for_a_while_but_counted():
    health, looping = after_fine_steps(truncated_rise=0.0), FINE | {"generation/repetition": 0.9}
    shown = [step for step in range(21, 33) if health.check(step, looping)]
    assert shown == [21, 26, 31]
    assert health.check(33, FINE | {"generation/truncated": 0.9}), "another kind"
    assert health.take_count() == 13 and health.take_count() == 0


def test_a_few_steps_make_no_median_and_fixed_data_has_no_lengths():
    health = after_fine_steps(5)
    assert health.check(6, FINE | {"loss": 100.0}) == []
    assert after_fine_steps().check(21, {"loss": 1.0}) == []


def test_usual_follows_the_run():
    """A median: one spike does not hide the next."""
    health = after_fine_steps()
    assert health.check(21, FINE | {"loss": 100.0}) and health.check(30, FINE | {"loss": 100.0})
    for step in range(100, 200):
        health.check(step, FINE | {"loss": 100.0})
    assert health.check(200, FINE | {"loss": 100.0}) == []


def test_a_negative_loss_spikes_by_its_usual_size():
    """With advantages the loss is below 0 or about it, and that is no sign."""
    health, losses = Health(Warn(), quiet_steps=1), [-0.1, -0.11, 0.1, -0.09]
    assert not any(health.check(step, {"loss": losses[step % 4]}) for step in range(1, 41))
    (line,) = health.check(41, {"loss": 0.6})
    assert "logger.warn.loss_spike" in line
