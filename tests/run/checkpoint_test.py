"""Checkpoints by themselves: copies, checksums, which are kept, and saves that fail."""

import json
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.base import manifest
from distill.base.errors import RunStopped, UserError
from distill.run.checkpoint import Checkpoints, SaveSchedule

ACCURACY, FORWARD_KL = "eval/student/accuracy", "eval/student/forward_kl"


def make_state(value: float) -> dict[str, jax.Array]:
    return {"weights": jnp.full((64, 32), value), "step": jnp.asarray(int(value))}


def save(checkpoints: Checkpoints, step: int, **scores: float) -> None:
    checkpoints.save(step, make_state(step), {"scores": scores})


def filled(folder, steps=(1, 2), **options) -> Checkpoints:
    """Checkpoints of these steps, saved one after the other."""
    checkpoints = Checkpoints(folder, **{"keep": 2, **options})
    for step in steps:
        save(checkpoints, step)
    checkpoints.close()
    return Checkpoints(folder, **{"keep": 2, **options})


def test_state_may_be_overwritten_as_soon_as_save_returns(tmp_path, monkeypatch):
    """The writing waits until the donated buffers hold other numbers."""
    overwritten, write = threading.Event(), manifest.write_manifest
    monkeypatch.setattr(
        "distill.run.checkpoint.write_manifest",
        lambda folder: overwritten.wait(60) and write(folder),
    )
    state = jax.jit(lambda: {"weights": jnp.full((512, 512), 1.0)})()
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {"scores": {}})
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 6, tree), donate_argnums=0)
    for _ in range(3):
        state = jax.block_until_ready(overwrite(state))
    overwritten.set()
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=1)
    np.testing.assert_array_equal(checkpoints.restore(1, shapes)["weights"], 1.0)


def test_newest_are_kept_and_the_best_by_the_metric(tmp_path):
    checkpoints = Checkpoints(tmp_path / "max", keep=2, best_metric=ACCURACY)
    for step, accuracy in enumerate((0.1, 0.5, 0.5, 0.3, 0.2), start=1):
        assert checkpoints.is_best({ACCURACY: accuracy}) == (step <= 2)
        save(checkpoints, step, **{ACCURACY: accuracy})
    save(checkpoints, 6)  # a step that was not evaluated
    checkpoints.close()
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2
    checkpoints = Checkpoints(tmp_path / "min", keep=1, best_metric=FORWARD_KL)
    for step, divergence in enumerate((0.3, 0.1, 0.2), start=1):
        save(checkpoints, step, **{FORWARD_KL: divergence})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3] and checkpoints.best() == 2


def test_what_is_no_number_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, best_metric=FORWARD_KL)
    for step, divergence in enumerate((math.nan, 0.3, math.inf), start=1):
        assert checkpoints.is_best({FORWARD_KL: divergence}) == (step == 2)
        save(checkpoints, step, **{FORWARD_KL: divergence})
    checkpoints.close()
    assert checkpoints.best() == 2


def test_arrays_and_record_come_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    arrays = {"log_probs_br": np.array([[0.1, np.nan]], np.float32)}
    checkpoints.save(3, make_state(3), {"scores": {}, "loss": 0.1}, arrays)
    checkpoints.close()
    assert checkpoints.record(3)["loss"] == 0.1
    np.testing.assert_array_equal(checkpoints.arrays(3)["log_probs_br"], arrays["log_probs_br"])
    assert filled(tmp_path / "without").arrays(1) == {}


# --------------------------------------------------------------------------------- torn ones


def damages(path) -> dict[str, bytes]:
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    return {"truncated": whole[:-1], "emptied": b"", "flipped": flipped}


def test_every_damage_to_every_file_is_refused_by_name(tmp_path):
    checkpoints = filled(tmp_path)
    files = sorted(path for path in checkpoints.path(2).rglob("*") if path.is_file())
    assert len(files) > 5
    caught = 0
    for path in files:
        whole = path.read_bytes()
        for kind, contents in damages(path).items():
            if contents == whole:
                continue  # an empty file, emptied
            path.write_bytes(contents)
            with pytest.raises(UserError) as error:
                checkpoints.latest_intact("stop")
            words = (str(checkpoints.path(2)), path.name, "nothing was changed", "on_torn=previous")
            assert all(word in str(error.value) for word in words), (path, kind, str(error.value))
            caught += 1
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            checkpoints.latest_intact("stop")
        path.write_bytes(whole)
    assert checkpoints.latest_intact("stop") == 2, "all put back"
    print(f"{len(files)} files, {caught} damages caught")


def test_surplus_file_is_a_damage_too(tmp_path):
    checkpoints = filled(tmp_path)
    (checkpoints.path(2) / "state" / "more").write_text("")
    with pytest.raises(UserError, match="state/more is not in SHA256SUMS"):
        checkpoints.latest_intact("stop")


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, make_state(2), {"step": 2, "scores": {}})
    checkpoints.close()
    checkpoints.path(2).rename(checkpoints.path(3))
    with pytest.raises(UserError, match="3 is damaged .record.json is of step 2"):
        checkpoints.latest_intact("stop")


def test_previous_is_used_when_asked_and_nothing_is_deleted(tmp_path, capsys):
    checkpoints = filled(tmp_path)
    path = checkpoints.path(2) / "record.json"
    path.write_text("{}")
    assert checkpoints.latest_intact("previous") == 1
    assert "checkpoint 2 is damaged (record.json" in capsys.readouterr().out
    assert (tmp_path / "2.torn" / "record.json").read_text() == "{}"
    # The step comes again, is damaged again, and set aside under another name.
    save(checkpoints, 2)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep=2)
    path.write_text("[]")
    assert checkpoints.latest_intact("previous") == 1
    assert (tmp_path / "2.torn").is_dir() and (tmp_path / "2.torn-2").is_dir()
    assert Checkpoints(tmp_path, keep=2).latest_intact("stop") == 1


def test_all_damaged_is_no_new_run(tmp_path):
    checkpoints = filled(tmp_path)
    for step in (1, 2):
        (checkpoints.path(step) / "record.json").unlink()
    with pytest.raises(UserError, match="so are all others"):
        checkpoints.latest_intact("previous")
    assert checkpoints.steps() == [1, 2], "nothing is set aside"


def test_unfinished_saves_and_removals_are_swept(tmp_path):
    checkpoints = filled(tmp_path)
    for name in ("3.partial", "0.removed"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert checkpoints.steps() == [1, 2]
    checkpoints.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# -------------------------------------------------------------------------- saves that fail


def test_failed_save_leaves_the_older_one_and_says_so(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.run.checkpoint.write_manifest", full)
    save(checkpoints, 3)
    with pytest.raises(RunStopped) as error:
        checkpoints.close()
    for words in ("step 3 could not be saved", "No space left", "checkpoint 2 is intact"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_failure_is_noticed_without_another_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    failed = threading.Event()

    def fail(folder):
        failed.set()
        raise OSError("gone")

    monkeypatch.setattr("distill.run.checkpoint.write_manifest", fail)
    save(checkpoints, 1)
    assert failed.wait(60)
    with pytest.raises(RunStopped, match="there is no earlier one"):
        for _ in range(1000):
            checkpoints.check()
            threading.Event().wait(0.01)
    checkpoints.close()


# ------------------------------------------------------------------------------------- when


def test_saves_follow_steps_clock_and_the_end(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("distill.run.checkpoint.time.monotonic", lambda: clock[0])
    schedule = SaveSchedule(every_steps=4, every_minutes=1.0, max_steps=10)
    assert [step for step in range(1, 11) if schedule.counts(step)] == [4, 8, 10]
    assert not schedule.has_come()
    clock[0] = 61.0
    assert schedule.has_come()
    schedule.restart_clock()
    assert not schedule.has_come()
    only_last = SaveSchedule(every_steps=0, every_minutes=0.0, max_steps=10)
    clock[0] = 1e6
    assert [step for step in range(1, 11) if only_last.counts(step)] == [10]
    assert not only_last.has_come()


def test_checksums_are_those_of_sha256sum(tmp_path):
    checkpoints = filled(tmp_path)
    lines = (checkpoints.path(2) / manifest.NAME).read_text().splitlines()
    names = [line.split("  ")[1] for line in lines]
    assert "record.json" in names and any(name.startswith("state/") for name in names)
    assert json.loads((checkpoints.path(2) / "record.json").read_text()) == {"scores": {}}
