"""Where numbers go."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import tiny_config, with_models

import distill
from distill.base.compilation import count_compiled_programs
from distill.base.errors import RunStopped, UserError
from distill.build.run import check_loggers
from distill.build.session import Session
from distill.config.schema import Logger, Warn
from distill.run.health import Health
from distill.run.progress import Progress
from distill.run.writers import HostedRun, JsonLines, MetricsWriter, TensorBoard


def steps_in(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_keeps_what_was_there_when_the_run_was_saved(tmp_path):
    """Lines of that very step that came later, such as its evaluation, come again."""
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    size = writer.size()
    writer.write(3, {"eval/student/accuracy": 0.5})
    writer.write(4, {"loss": 4.0})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    writer = JsonLines(tmp_path, size)
    assert writer.size() == size
    writer.write(3, {"eval/student/accuracy": 0.5})
    writer.close()
    assert steps_in(path) == [1, 2, 3, 3]


def test_new_run_in_a_folder_without_checkpoint_starts_over(tmp_path):
    for _ in range(2):
        writer = JsonLines(tmp_path, 0)
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_lines_are_json_even_without_numbers(tmp_path):
    writer = JsonLines(tmp_path, 0)
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 8.0})
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 8.0}


class Service:
    """wandb or trackio as far as it is used: their signatures, and runs that may fail."""

    def __init__(self, fails_at: str = ""):
        self.runs: list[dict] = []
        self.fails_at, self.logged, self.finished = fails_at, [], 0

    def init(self, *, project, config, resume, id=None, dir=None, name=None):
        self._fail("init")
        self.runs.append(dict(project=project, resume=resume, id=id or name))
        return self

    def log(self, metrics, step):
        self._fail("log")
        self.logged.append(step)

    def finish(self):
        self._fail("finish")
        self.finished += 1

    def _fail(self, method: str) -> None:
        if self.fails_at == method:
            raise ConnectionError("no route\nto host")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_one_run_over_all_starts(name, tmp_path, models, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    config = with_models(tiny_config(max_steps=2), models)
    config.data.validation.max_samples, config.logger.writers = 0, (name,)
    distill.train(config, tmp_path)
    assert service.logged == [1, 2] and service.finished
    assert not (tmp_path / "tensorboard").exists(), "which was not asked for"
    config.distillation.max_steps = 3
    distill.train(config, tmp_path)
    first, second = service.runs
    assert first == second and len(first["id"]) == 8 and service.logged == [1, 2, 3]
    # A server that is gone stops no run that goes on, but one that begins is told.
    service.fails_at = "init"
    config.distillation.max_steps = 4
    assert distill.train(config, tmp_path).steps == 4
    monkeypatch.setattr(Session, "load_teachers", None)
    with pytest.raises(UserError, match=f"{name}, which does not start .no route to host.: log in"):
        distill.train(config, tmp_path / "new")


@pytest.mark.parametrize("method", ["log", "finish"])
def test_a_failing_service_is_left_out(method, tmp_path, capsys):
    writer = MetricsWriter(JsonLines(tmp_path, 0), HostedRun(Service(method)))
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]
    (line,) = capsys.readouterr().out.splitlines()
    assert "HostedRun failed and is left out from here on (ConnectionError: no route" in line


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_says_how_to_install(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        check_loggers(Logger(writers=(name,)))


def make_progress(workdir, logging_steps=2, show_bar=False, **warn) -> Progress:
    return Progress(
        MetricsWriter(JsonLines(workdir, 0), TensorBoard(workdir, 0)),
        lambda step: 0.1 * step,
        first_step=0,
        max_steps=4,
        logging_steps=logging_steps,
        max_log_prob_gap=0.1,
        max_skipped_steps=2,
        health=Health(Warn(**warn), quiet_steps=10),
        names=lambda rows: [f"example {row}" for row in rows],
        show_bar=show_bar,
    )


def run_step(
    progress: Progress,
    step: int,
    gap: float = 0.0,
    staleness: float = 0.0,
    loss: float = 1.0,
    skipped: float = 0.0,
) -> None:
    progress.begin_step(step - 1, jnp.zeros(()))
    for name in ("generate", "train"):
        with progress.phase(name) as finish:
            finish(jnp.ones(()))
    values = {
        "loss": loss,
        "grad_norm": 1.0,
        "log_prob_gap": gap,
        "tokens": 8.0,
        "skipped": skipped,
    }
    measured = {
        "generation/staleness": staleness,
        "generation/seconds": 1e-3,
        "generation/slot_occupancy": 0.9,
    }
    metrics = {name: jnp.asarray(value) for name, value in values.items()}
    progress.end_step(step, metrics, measured, np.array([step, step + 1]))


def test_logged_steps_carry_rates_and_the_rate_of_learning(tmp_path, capsys):
    count_compiled_programs()
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
        assert line["compilation/programs"] >= 0 and line["compilation/seconds"] >= 0
    assert capsys.readouterr().out.count("compiled so far: ") == 1


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


def lines_in(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_skipped_steps_are_counted_named_and_too_many_of_them_in_a_row_end_the_run(
    tmp_path, capsys
):
    progress = make_progress(tmp_path, logging_steps=1)
    nan = float("nan")
    for step, skipped in enumerate((1, 1, 0, 1, 1), start=1):
        loss, gap = (nan, nan) if skipped else (1.0, 0.0)  # the gap of such a step says nothing
        run_step(progress, step, loss=loss, gap=gap, skipped=skipped)
        assert not progress.too_many_skipped, "two in a row are allowed"
    run_step(progress, 6, loss=nan, skipped=1)
    for words in ("3 steps in a row", "max_skipped_steps=2", "learning_rate"):
        assert words in progress.too_many_skipped
    progress.close()
    lines = lines_in(tmp_path)
    assert [line["skipped"] for line in lines if "skipped" in line] == [1, 2, 2, 3, 4, 5]
    assert lines[0] == {"step": 1, "skipped_examples": ["example 1", "example 2"]}
    # The schedule goes by updates: 0.1 per update, of which one was made before step 4.
    assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx(
        [0, 0, 0, 0.1, 0.1, 0.1]
    )
    assert "step 4 is skipped: loss nan" in capsys.readouterr().out


def test_counts_go_on_where_the_saved_run_was(tmp_path):
    for name in ("whole", "first", "second"):
        (tmp_path / name).mkdir()
    whole, first, second = (make_progress(tmp_path / name) for name in ("whole", "first", "second"))
    for step in range(1, 13):
        loss = 1.0 if step < 12 else 9.0
        run_step(whole, step, loss=loss, skipped=step == 3)
        if step == 7:
            second.restore(json.loads(json.dumps(first.state())))
        run_step(first if step < 7 else second, step, loss=loss, skipped=step == 3)
        first.flush()
    whole.flush()
    second.flush()
    assert second.state() == whole.state() and whole.state()["skipped"] == 1


def test_warnings_are_counted_in_the_log_and_shown_rarely(tmp_path, capsys):
    progress = make_progress(tmp_path, logging_steps=1, loss_spike=5.0)
    for step in range(1, 31):
        run_step(progress, step, loss=100.0 if step in (15, 18, 26) else 1.0)
    progress.close()
    warned = [line["step"] for line in lines_in(tmp_path) if line["warnings"]]
    assert warned == [15, 18, 26]
    shown = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(shown) == 2 and "step 15: loss is 100, usually 1" in shown[0]
    assert "step 26" in shown[1] and "logger.warn.loss_spike" in shown[1]
