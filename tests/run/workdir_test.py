"""A run's folder belongs to one run at a time."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

import distill
from distill.base.compilation import keep_compiled_programs
from distill.base.errors import UserError
from distill.base.files import check_output, local_path
from distill.checks.probe import probe_alone
from distill.config import default_config
from distill.configs import arithmetic
from distill.export import export_checkpoint
from distill.generate import generate, score
from distill.run.workdir import LOCK, claim_workdir


def test_folder_is_made_held_and_left_as_it_was(tmp_path):
    workdir = tmp_path / "a" / "run"
    with claim_workdir(workdir):
        assert (workdir / LOCK).exists()
        with pytest.raises(UserError, match=f"another run .process {os.getpid()} on"):
            with claim_workdir(workdir):
                pass
    assert not workdir.exists()
    with claim_workdir(workdir):
        (workdir / "metrics.jsonl").write_text("")
    assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]


def test_death_of_the_holder_frees_the_folder(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from distill.run.workdir import claim_workdir\n"
        "with claim_workdir(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == -9
    assert (tmp_path / LOCK).exists()
    with claim_workdir(tmp_path):
        pass


def test_lock_removed_between_opening_and_locking_is_no_lock(tmp_path, monkeypatch):
    """The run before ends just then: its file is not the one that others will find."""
    flock, calls = fcntl.flock, []

    def removed_first(file, operation):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with claim_workdir(tmp_path):
        assert len(calls) == 2 and (tmp_path / LOCK).exists()


def test_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def unsupported(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claim_workdir(tmp_path):
        assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().out


def test_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the workdir .*Not a directory"):
        with claim_workdir(tmp_path / "file" / "run"):
            pass

    def read_only(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match="Read-only file system.*another --workdir"):
        with claim_workdir(tmp_path):
            pass


def test_commands_refuse_early_what_they_could_not_write(tmp_path):
    """And scores never take the place of anything but scores."""
    config = arithmetic.get_config("short")
    model, (folder, file) = config.policy.model_name, (tmp_path / "folder", tmp_path / "file")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    file.write_text("mine")
    for write, words in {
        lambda: generate(config, model, folder): "folder is a folder: pass --output=FILE",
        lambda: generate(config, model, file / "x"): "cannot write .*file/x .File exists",
        lambda: score(config, folder): "folder is not empty and holds no scores.json",
        lambda: score(config, file): "file is a file",
        lambda: score(config, file / "x"): "cannot write .*file/x .File exists",
        lambda: export_checkpoint(config, tmp_path, file / "x"): "cannot write .*file/x .File exi",
        lambda: probe_alone(config, file / "x"): "cannot write .*/probe.json .Not a directory",
    }.items():
        with pytest.raises(UserError, match=words):
            write()
    check_output(tmp_path / "new" / "x.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "new"]
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://b", "gs:/b/run", "file:///tmp/x"])
def test_addresses_are_no_folders_and_make_none(path, tmp_path, monkeypatch):
    """Nothing that is written may end in a local folder named `gs:`."""
    monkeypatch.chdir(tmp_path)
    config = default_config()
    config.policy.model_name = config.distillation.teacher_model_path = "model"
    writes = {
        "a run": lambda: distill.train(config, path),
        "an export": lambda: export_checkpoint(config, "run", path),
        "responses": lambda: generate(config, "model", path),
        "programs": lambda: keep_compiled_programs(path),
    }
    for what, write in writes.items():
        with pytest.raises(UserError, match="is no folder of this machine.*mount it"):
            write()
        assert not list(tmp_path.iterdir()), what
    assert local_path("~/run").is_absolute() and local_path("C.run:1").name == "C.run:1"
