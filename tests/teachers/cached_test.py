"""Runs on a teacher's scores on disk: as with the teacher, which they do without."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill.base.errors import UserError
from distill.build import teachers as build_teachers
from distill.build.session import open_session
from distill.config.parse import default_config, parse_config
from distill.data.scores import Scores, ScoreWriter
from distill.generate import score
from distill.teachers.base import Teacher

ROOT = Path(__file__).parents[2]


class TopTokens(Teacher):
    """Says of each token, by its place and what stands before it, three tokens."""

    def __init__(self, *_):
        pass

    def score(self, sequences):
        before_n = np.roll(sequences["tokens"], 1)
        ids_nk = (before_n[:, None] + np.arange(3)) % 15
        shares_nk = np.array([0.5, 0.25, 0.125]) + before_n[:, None] / 1000
        return {"teacher_ids": ids_nk, "teacher_log_probs": np.log(shares_nk)}


def run_config(models):
    """Two epochs and a half."""
    config = with_models(tiny_config(lambda_=0.0, max_steps=5, save_steps=0), models)
    config.data.max_samples, config.data.shuffle = 16, True
    config.data.validation.max_samples = 0
    config.teacher.precision = "bfloat16"
    return config


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("scores") / "scores"
    config = run_config(models)
    with open_session(parse_config(config)) as session:
        expected = sum(map(len, session.prompts.response_tokens))
    assert score(config, output) == expected
    return output


def no_teacher(*_, **__):
    raise AssertionError("the teacher is loaded")


def test_run_equals_one_with_the_teacher_and_loads_none(models, tmp_path, monkeypatch):
    config = run_config(models)
    config.policy.sequence_packing.enabled = True
    config.teacher.update(precision="float32", prompt_template="{answer}={problem}")
    live = distill.train(config, tmp_path / "live")
    config.teacher.scores = str(tmp_path / "scores")
    score(config, tmp_path / "scores")
    monkeypatch.setattr(build_teachers, "_load", no_teacher)
    cached = distill.train(config, tmp_path / "cached")
    names = "loss", "grad_norm", "teacher_log_prob"
    ours, theirs = (
        [line[name] for line in read_metrics(tmp_path / run) if "loss" in line for name in names]
        for run in ("cached", "live")
    )
    assert len(ours) == 15 and len(set(ours)) > 10
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (cached, live))
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key].astype("f"), value.astype("f"), atol=1e-4, err_msg=key)


def test_scores_of_a_server_are_its_likeliest_tokens(models, tmp_path, monkeypatch):
    monkeypatch.setattr(build_teachers, "ServerTeacher", TopTokens)
    config = run_config(models)
    config.teacher.backend, config.teacher.vllm.urls = "vllm", ("http://host:8000",)
    score(config, tmp_path / "scores")
    config.teacher.scores = str(tmp_path / "scores")
    with open_session(parse_config(config)) as session:
        teacher, sequences = session.load_teachers()[""], session.prompts.sequences([5, 0, 15])
        found, expected = teacher.score(sequences), TopTokens().score(sequences)
    assert teacher.graph is teacher.fetch() is None
    trained_n = sequences["weight"] != 0
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name][trained_n], values[trained_n])
    assert (found["teacher_ids"][~trained_n] == -1).all()


def test_only_the_head_is_there(models, folder):
    config = run_config(models)
    config.teacher.scores = str(folder)
    with open_session(parse_config(config)) as session:
        teacher = session.load_teachers()[""]
        assert [path for path, _ in nnx.to_flat_state(teacher.fetch())] == [("embedding",)]
        sequences = session.prompts.sequences([3, 1])
        hidden_nd = teacher.score(sequences)["teacher_hidden"]
    assert hidden_nd.dtype == "bfloat16"
    np.testing.assert_array_equal((hidden_nd != 0).any(axis=1), sequences["weight"] != 0)


def torn(folder):
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 8)


def lost(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


def unfinished(folder):
    folder.rename(folder.with_name("scores.partial"))


REFUSED = {
    torn: "damaged, 000001.safetensors does not match",
    cut: "damaged, 000000.safetensors does not match",
    lost: "damaged, 000000.safetensors, which SHA256SUMS lists, is missing",
    unfinished: "no finished scores are there",
    "teacher": "of another teacher (",
    "teacher.precision": "of another teacher.precision (bfloat16 there, float32 here)",
    "data": "of another data (",
    "view": "of another view (",
}


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: getattr(fault, "__name__", fault))
def test_what_is_not_whole_or_of_something_else_is_refused(
    models, folder, tmp_path, monkeypatch, fault
):
    monkeypatch.setattr(build_teachers, "build_head", no_teacher)
    config, copy = run_config(models), Path(shutil.copytree(folder, tmp_path / "scores"))
    config.teacher.scores = str(copy)
    if callable(fault):
        fault(copy)
    elif fault == "teacher":
        config.distillation.teacher_model_path = models["student"]
    elif fault == "data":
        config.data.max_samples = 15
    else:
        values = {"teacher.precision": "float32", "view": "{answer}={problem}"}
        key = "precision" if "precision" in fault else "prompt_template"
        config.teacher[key] = values[fault]
    with pytest.raises(UserError, match="^teacher.scores=") as caught:
        distill.train(config, tmp_path / "run")
    assert REFUSED[fault] in str(caught.value) and "\n" not in str(caught.value)


def test_a_named_teachers_scores_are_refused_by_its_own_key(models, tmp_path):
    config = run_config(models)
    path, config.distillation.teacher_model_path = config.distillation.teacher_model_path, ""
    config.teacher.precision = default_config().teacher.precision
    with config.unlocked():
        config.teachers.math = {"model": path, "scores": str(tmp_path / "none")}
    with pytest.raises(UserError, match="^teachers.math.scores=.*no finished scores are there"):
        distill.train(config, tmp_path / "run")


WRITER = """
import os, signal, sys
import numpy as np
from distill.data import scores
from distill.base import manifest
folder, point, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner, name = {"file": (scores.os, "replace"), "sync": (scores.os, "fsync"),
  "sums": (scores, "write_manifest"), "digest": (manifest, "_digest"),
  "rename": (scores.shutil, "rmtree"), "none": (scores, "save")}[point]
original, calls = getattr(owner, name), []
def dies(*arguments, **options):
    calls.append(0)
    if point != "none" and len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(owner, name, dies)
writer = scores.ScoreWriter(scores.Path(folder), {"data": "x"}, 2)
first = writer.rows
for row in range(first, 5, 2):
    values = np.arange(row, min(row + 2, 5)).repeat(3)[:, None]
    writer.add({"teacher_hidden": values.astype(np.float32)})
writer.finish()
print(first)
"""


def test_killed_writer_leaves_nothing_that_is_believed_and_goes_on(tmp_path):
    """kill -9 before every file, while one is written, and at each step of the end."""
    folder = tmp_path / "scores"

    def write(point, number):
        command = [sys.executable, "-c", WRITER, folder, point, number]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    def read():
        scores = Scores(folder, {"data": "x"}, [3] * 5)
        return [scores.row(row)["teacher_hidden"].tolist() for row in range(5)]

    for kill in ("file:1", "sync:1", "file:3", "sync:2", "sums:1", "digest:2", "rename:1"):
        killed = write(*kill.split(":"))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with pytest.raises(UserError, match="no finished scores are there"):
            read()
    done = write("none", "0")
    assert done.stdout == "6\n", done.stderr  # of 5 rows, all were written
    assert read() == [[[row]] * 3 for row in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    # Of other data, it starts over.
    partial = folder.with_name("scores.partial")
    folder.rename(partial)
    about = json.loads((partial / "scores.json").read_text())
    assert ScoreWriter(folder, about["identity"], 2).rows == 6
    assert ScoreWriter(folder, {"data": "y"}, 2).rows == 0
