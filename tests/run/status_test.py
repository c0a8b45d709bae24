"""What takes a while says so, on a terminal and elsewhere."""

import re
import threading
import time

import jax.numpy as jnp
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


def test_elsewhere_lines_say_what_begins_how_far_it_is_and_how_long_it_took(capsys, monkeypatch):
    monkeypatch.setattr(status, "_TICK", 0.01)
    monkeypatch.setattr(status, "_WORTH_SAYING", 0.1)
    monkeypatch.setattr(status, "_EVERY", 0.4)
    with status.busy("loading the teacher"):
        status.how_far("3 of 9 files")
        time.sleep(1.0)
        with status.busy("a part of it"):  # the innermost speaks, and what is quick does not
            pass
    with status.busy("loading the student"):
        pass
    shown = capsys.readouterr()
    assert shown.err == "" and not tickers()
    first, *others, last = shown.out.splitlines()
    assert first == "loading the teacher ..." and 1 <= len(others) <= 2
    so_far = r"\d\d:\d\d:\d\d loading the teacher: \d s so far, 3 of 9 files"
    assert all(re.fullmatch(so_far, line) for line in others)
    assert re.fullmatch(r"loading the teacher: 1\.\d s", last)


def test_a_long_step_says_what_it_is_doing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(status, "_TICK", 0.01)
    monkeypatch.setattr(status, "_EVERY", 0.1)
    monkeypatch.setattr(status, "_WORTH_SAYING", 60.0)
    progress = make_progress(tmp_path, show_bar=True)
    run_step(progress, 1)
    progress.begin_step(1, jnp.zeros(()))
    with progress.phase("generate"):
        status.how_far("5 of 8 responses")
        time.sleep(0.5)
    progress.abandon()
    assert re.search(r"step 2 of 4: generate: \d s so far, 5 of 8 resp", capsys.readouterr().out)
    assert not tickers()


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
    counts = {"compilation/programs": 7, "compilation/seconds": 1.25}
    monkeypatch.setattr(metrics, "compiled", lambda: counts)
    progress = make_progress(tmp_path, show_bar=True)
    for step in range(1, 5):
        run_step(progress, step)
    progress.close()
    shown = capsys.readouterr()
    assert shown.err == ""
    line = r"\d\d:\d\d:\d\d step %d of 4: loss 1.0000, learning rate %s, \d+ tokens/s, 00:00 left"
    compiled, *shown_lines = shown.out.splitlines()
    assert compiled == "compiled so far: 7 programs, 1.2 s"
    for found, expected in zip(shown_lines, ((2, "1.00e-01"), (4, "3.00e-01")), strict=True):
        assert re.fullmatch(line % expected, found), found


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
