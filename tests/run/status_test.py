"""What takes a while says so, on a terminal and elsewhere."""

import re
import threading
import time
from types import SimpleNamespace

import pytest
from metrics_test import make_progress, run_step

from distill.base import status
from distill.run import progress as metrics


@pytest.fixture
def terminal(monkeypatch):
    for module in (status, metrics):
        monkeypatch.setattr(module, "shows_bars", lambda: True)
    monkeypatch.setattr(status, "_TICK", 0.02)
    monkeypatch.setattr(status, "_WORTH_SAYING", 0.5)


def tickers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "status"]


def test_elsewhere_one_line_says_how_long_it_took(capsys, monkeypatch):
    clock = iter((10.0, 11.25, 12.0, 12.5))
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with status.busy("loading the teacher"):
        pass
    with status.busy("loading the student"):
        pass
    shown = capsys.readouterr()
    assert shown.err == ""
    [line] = shown.out.splitlines()
    assert line == "loading the teacher: 1.2 s"


def test_a_terminal_shows_the_seconds_meanwhile(capsys, terminal):
    with status.busy("loading the teacher"):
        drawn, deadline = "", time.monotonic() + 60
        while "loading the teacher: 00:01" not in drawn and time.monotonic() < deadline:
            time.sleep(0.05)
            drawn += capsys.readouterr().err
    assert "loading the teacher: 00:01" in drawn and not tickers()
    assert re.search(r"loading the teacher: \d+\.\d s", capsys.readouterr().out)


def test_errors_pass_and_end_the_line(capsys, terminal):
    with pytest.raises(RuntimeError), status.busy("loading"):
        raise RuntimeError("a fault")
    assert not tickers() and capsys.readouterr().out == ""


def test_logged_steps_are_lines_where_no_bar_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(status, "_WORTH_SAYING", 60.0)
    progress = make_progress(tmp_path, show_bar=True)
    for step in range(1, 5):
        run_step(progress, step)
    progress.close()
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [line.partition(",")[0] for line in shown.out.splitlines()] == [
        "step 2: loss 1.0000",
        "step 4: loss 1.0000",
    ]


def test_failing_first_step_leaves_no_counting_behind(tmp_path, terminal):
    progress = make_progress(tmp_path, show_bar=True)
    progress.begin_step(0, None)
    assert tickers()
    progress.abandon()
    assert not tickers()


def test_bar_is_drawn_on_a_terminal_and_no_line_printed(tmp_path, capsys, terminal):
    progress = make_progress(tmp_path, show_bar=True)
    for step in range(1, 5):
        run_step(progress, step)
    progress.close()
    shown = capsys.readouterr()
    assert "4/4" in shown.err and "compiling, with the first step" in shown.err
    assert "loss" not in shown.out
