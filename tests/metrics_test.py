"""Where numbers go."""

import json
import sys

import jax.numpy as jnp
import pytest

from distill.errors import RunStopped, UserError
from distill.metrics import MetricsWriter, Progress


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_drops_lines_after_the_checkpoint_and_torn_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    writer = MetricsWriter(tmp_path, resume_step=3)
    writer.write(4, {"loss": 0.0})
    writer.close()
    assert steps_in(path) == [1, 2, 3, 4]


def test_new_run_in_a_folder_without_checkpoint_starts_over(tmp_path):
    for _ in range(2):
        writer = MetricsWriter(tmp_path, resume_step=0)
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_wandb_missing_says_how_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsWriter(tmp_path, resume_step=0, wandb_project="p")


def make_progress(workdir, logging_steps=2) -> Progress:
    return Progress(
        MetricsWriter(workdir, resume_step=0),
        lambda step: 0.1 * step,
        first_step=0,
        max_steps=4,
        logging_steps=logging_steps,
        max_log_prob_gap=0.1,
        show_bar=False,
    )


def run_step(progress: Progress, step: int, gap: float = 0.0, staleness: float = 0.0) -> None:
    progress.begin_step(step - 1, jnp.zeros(()))
    for name in ("generate", "train"):
        with progress.phase(name) as finish:
            finish(jnp.ones(()))
    values = {"loss": 1.0, "log_prob_gap": gap, "tokens": 8.0, "on_policy": 1.0}
    measured = {
        "generation/staleness": staleness,
        "generation/seconds": 1e-3,
        "generation/slot_occupancy": 0.9,
    }
    progress.end_step(step, {name: jnp.asarray(value) for name, value in values.items()}, measured)


def test_logged_steps_carry_rates_and_the_rate_of_learning(tmp_path):
    progress = make_progress(tmp_path)
    for step in range(1, 5):
        run_step(progress, step)
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    # Update 2 was made with the schedule's value after one update.
    assert lines[0]["learning_rate"] == pytest.approx(0.1)
    for line in lines:
        assert line["tokens_per_second/train"] == pytest.approx(8 / line["seconds/train"])
        assert line["tokens_per_second/total"] > 0
        assert line["seconds/step"] >= line["seconds/generate"] + line["seconds/train"]
        # What a backend measured is passed on, with its share of the step.
        assert line["generation/slot_occupancy"] == 0.9 and line["generation/staleness"] == 0
        assert line["generation/share_of_step"] == pytest.approx(1e-3 / line["seconds/step"])


def test_metrics_are_reported_one_step_late(tmp_path):
    progress = make_progress(tmp_path, logging_steps=100)
    run_step(progress, 1, gap=0.2)
    with pytest.raises(RunStopped, match="step 1: .*disagree by 0.200"):
        run_step(progress, 2)


def test_undefined_gap_stops_too(tmp_path):
    progress = make_progress(tmp_path)
    run_step(progress, 1, gap=float("nan"))
    with pytest.raises(RunStopped):
        progress.close()


def test_gap_of_a_stale_batch_is_logged_but_stops_only_when_undefined(tmp_path):
    progress = make_progress(tmp_path, logging_steps=1)
    run_step(progress, 1, gap=0.2, staleness=1.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["log_prob_gap"] == pytest.approx(0.2) and line["generation/staleness"] == 1
    for step, gap in ((2, float("nan")), (3, float("inf"))):
        with pytest.raises(RunStopped):
            run_step(progress, step, gap=gap, staleness=1.0)
