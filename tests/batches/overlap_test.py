"""The sampler on devices of its own, and sampling while a step trains."""

import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tiny_runs import read_metrics, tiny_config, with_models

import distill
from distill import trainer
from distill.base.errors import RunInterrupted, RunStopped, UserError
from distill.base.mesh import copy_to_mesh, make_mesh, make_sampler_mesh, make_staging_mesh
from distill.build.devices import split_devices
from distill.build.plugins import import_plugins
from distill.build.session import open_session
from distill.config.parse import parse_config
from distill.config.policy import Colocated, Generation
from distill.rollout.base import register_backend
from distill.rollout.in_process import JaxBackend
from distill.run import progress as metrics
from distill.run.interrupts import Interrupts


def separate_config(**distillation) -> ConfigDict:
    """Four devices train, four sample."""
    config = tiny_config(**distillation)
    config.data.validation.max_samples = 0
    config.policy.generation.colocated.enabled = False
    return config


def run_and_record(config: ConfigDict, workdir: Path, monkeypatch) -> list[tuple]:
    """Request and rollout of every sampled batch of a run, whose student is in its workdir."""
    records, generate = [], JaxBackend.generate

    def recording(self, request):
        rollout, measured = generate(self, request)
        records.append((request, rollout))
        return rollout, measured

    with monkeypatch.context() as patch:
        patch.setattr(JaxBackend, "generate", recording)
        distill.train(config, workdir)
    return records


def test_split_devices_give_the_curve_of_shared_ones(models, tmp_path, monkeypatch):
    """4 + 4 of 8 devices, weights cut two ways; the order of sums differs, nothing else."""
    config = with_models(separate_config(), models)
    config.mesh.fsdp = 2
    own = run_and_record(config, tmp_path / "own", monkeypatch)
    config.policy.generation.colocated.enabled = True
    shared = run_and_record(config, tmp_path / "shared", monkeypatch)
    for (_, ours), (_, theirs) in zip(own, shared, strict=True):
        np.testing.assert_array_equal(ours.tokens_br, theirs.tokens_br)
    lines = zip(read_metrics(tmp_path / "own"), read_metrics(tmp_path / "shared"), strict=True)
    for ours, theirs in lines:
        # Adam divides by the root of tiny squared gradients: rounding grows from step to step.
        for name in ("loss", "grad_norm", "student_log_prob"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
        assert ours["log_prob_gap_max"] < 1e-3


def test_split_may_change_when_a_run_goes_on(models, tmp_path):
    config = with_models(separate_config(max_steps=4), models)
    config.policy.generation.colocated.sampler_devices = 4
    distill.train(config, tmp_path)
    config.policy.generation.colocated.enabled = True
    config.policy.generation.colocated.sampler_devices = 0
    assert distill.train(config, tmp_path).steps == 4


# ------------------------------------------------------------------------------------ overlap


def async_config(steps: int = 2, **distillation) -> ConfigDict:
    """The first of six batches is fresh; checkpoints are made at 2, 4 and 6."""
    config = separate_config(**distillation)
    config.policy.generation.async_steps = steps
    config.policy.generation.importance_clip = 2.0
    return config


def rollout_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rollout")]


@pytest.fixture(scope="module")
def recorded(models, tmp_path_factory) -> tuple[Path, list[tuple]]:
    workdir = tmp_path_factory.mktemp("overlap")
    with pytest.MonkeyPatch.context() as patch:
        return workdir, run_and_record(with_models(async_config(), models), workdir, patch)


@pytest.fixture(scope="module")
def finished(recorded) -> tuple[Path, distill.Result]:
    workdir, _ = recorded
    return workdir, distill.Result({}, workdir / "student", 6)


def test_staleness_is_two_except_at_the_start(finished):
    workdir, _ = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation/staleness"] for line in lines] == [0, 1, 2, 2, 2, 2]
    gaps = [line["log_prob_gap"] for line in lines]
    assert gaps[0] < 1e-4, "fresh weights: sampler and trainer agree"
    assert min(gaps[1:]) > 1e-3, "updates lie between them"
    weights = [line["importance_weight"] for line in lines]
    assert weights[0] == pytest.approx(1, abs=1e-5)
    assert min(abs(weight - 1) for weight in weights[1:]) > 1e-5
    for line in lines:
        assert 0 < line["generation/mean_length"] <= line["generation/max_length"] <= 12
        assert line["generation/mean_length"] == pytest.approx(line["response_length"])
        assert line["generation/truncated"] == pytest.approx(line["truncated"])
        for name in ("seconds", "refit_seconds", "tokens_per_second", "share_of_step"):
            assert line[f"generation/{name}"] > 0
    assert not rollout_threads()


def test_batches_are_sampled_with_the_weights_of_two_updates_before(
    models, recorded, tmp_path, monkeypatch
):
    """The first three are of the student as it came: so says a run that leaves it as it is."""
    _, ours = recorded
    assert [request.version for request, _ in ours] == [0, 0, 0, 1, 2, 3]
    config = with_models(async_config(max_steps=4), models)
    config.policy.optimizer.learning_rate = 0.0
    theirs = run_and_record(config, tmp_path, monkeypatch)
    same = [
        np.array_equal(a.log_probs_br, b.log_probs_br)
        for (_, a), (_, b) in zip(ours, theirs, strict=False)
    ]
    assert same == [True, True, True, False]


def test_killed_run_resumes_to_the_same_bits(models, finished, tmp_path, monkeypatch):
    """Killed after update 5, while the sixth batch is sampled; checkpoints at 2 and 4 have two."""
    workdir, result = finished
    end_step = metrics.Progress.end_step

    def dies(self, step, *values):
        end_step(self, step, *values)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "end_step", dies)
        with pytest.raises(KeyboardInterrupt):
            distill.train(with_models(async_config(), models), tmp_path)
    assert (tmp_path / "checkpoints" / "2").exists(), "else it would start over"
    again = distill.train(with_models(async_config(), models), tmp_path)
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_steps_that_nobody_measures_give_the_same_bits(models, finished, tmp_path):
    """Logged steps wait for the device phase by phase, others only where they must."""
    _, result = finished
    unlogged = distill.train(with_models(async_config(logging_steps=100), models), tmp_path)
    weights = "model.safetensors"
    assert (unlogged.student / weights).read_bytes() == (result.student / weights).read_bytes()


def test_generation_and_training_are_under_way_together(models, tmp_path, monkeypatch):
    """They meet: generation s + 1 waits for the call of train step s, which waits for it.

    One after the other, the first would wait in vain. Both intervals are of the real functions.
    """
    meetings = {step: threading.Barrier(2) for step in (1, 2, 3)}
    generated, trained = {}, {}
    generate, make_train_step = JaxBackend.generate, trainer.make_train_step

    def meeting_generate(self, request):
        start = time.perf_counter()
        if request.step in meetings:
            assert threading.current_thread() is not threading.main_thread()
            meetings[request.step].wait(timeout=60)
        answer = generate(self, request)
        generated[request.step] = start, time.perf_counter()
        return answer

    def make_meeting_step(*args, **kwargs):
        train_step = make_train_step(*args, **kwargs)

        def step(state, *rest):
            start, number = time.perf_counter(), len(trained)
            if number + 1 in meetings:
                meetings[number + 1].wait(timeout=60)
            result = jax.block_until_ready(train_step(state, *rest))
            trained[number] = start, time.perf_counter()
            return result

        return step

    monkeypatch.setattr(JaxBackend, "generate", meeting_generate)
    monkeypatch.setattr(trainer, "make_train_step", make_meeting_step)
    distill.train(with_models(async_config(1, max_steps=4), models), tmp_path)
    for step in meetings:
        assert generated[step][0] < trained[step - 1][1]
        assert trained[step - 1][0] < generated[step][1]


@pytest.mark.parametrize("error", [RunStopped("the server is gone"), UserError("prompt too long")])
def test_error_in_the_thread_comes_out_once_the_step_is_saved(models, tmp_path, monkeypatch, error):
    generate = JaxBackend.generate

    def failing(self, request):
        if request.step == 3:
            raise error
        return generate(self, request)

    monkeypatch.setattr(JaxBackend, "generate", failing)
    with pytest.raises(type(error)) as raised:
        distill.train(with_models(async_config(), models), tmp_path)
    assert raised.value.__cause__ is error
    assert str(raised.value).startswith(f"{error} (step 3 is saved")
    assert not rollout_threads()


def test_interrupted_run_waits_for_its_thread(models, tmp_path, monkeypatch):
    """Interrupted in the train step while the thread generates."""
    generate, make_train_step = JaxBackend.generate, trainer.make_train_step
    generating, interrupted, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(self, request):
        if request.step == 1:
            generating.set()
            assert interrupted.wait(timeout=60)
            time.sleep(0.2)
        answer = generate(self, request)
        if request.step == 1:
            ended.set()
        return answer

    def make_interrupted_step(*args, **kwargs):
        def step(*_):
            assert generating.wait(timeout=60)
            interrupted.set()
            raise KeyboardInterrupt

        make_train_step(*args, **kwargs)
        return step

    monkeypatch.setattr(JaxBackend, "generate", slow)
    monkeypatch.setattr(trainer, "make_train_step", make_interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        distill.train(with_models(async_config(), models), tmp_path)
    assert ended.is_set() and not rollout_threads()


def test_fixed_batches_are_drawn_ahead_too(models, tmp_path, monkeypatch):
    """The same coins and prompts as without overlap, whichever batches are sampled."""
    config = with_models(async_config(lambda_=0.5), models)
    ahead = run_and_record(config, tmp_path / "ahead", monkeypatch)
    config.policy.generation.async_steps = 0
    strict = run_and_record(config, tmp_path / "strict", monkeypatch)
    for (ours, _), (theirs, _) in zip(ahead, strict, strict=True):
        assert ours.step == theirs.step
        np.testing.assert_array_equal(ours.prompt_index, theirs.prompt_index)
    lines = read_metrics(tmp_path / "ahead")
    assert [line["on_policy"] for line in lines] == [
        line["on_policy"] for line in read_metrics(tmp_path / "strict")
    ]
    for line in lines:
        stale = min(line["step"] - 1, 2) * (line["on_policy"] == 1)
        assert line["generation/staleness"] == stale
        assert ("generation/mean_length" in line) == (line["on_policy"] == 1)


def test_saving_changes_nothing(models, finished, tmp_path):
    """The batches under way are saved too: when a run is saved may follow a clock."""
    workdir, result = finished
    again = distill.train(with_models(async_config(save_steps=5), models), tmp_path)
    assert (tmp_path / "checkpoints" / "5" / "arrays.npz").exists()
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_stopped_run_takes_the_batch_that_was_under_way_with_it(
    models, finished, tmp_path, monkeypatch
):
    workdir, result = finished
    interrupts, end_step, stop = Interrupts(), metrics.Progress.end_step, JaxBackend.stop
    stopped = []

    def signalled(self, step, *values):
        end_step(self, step, *values)
        if step == 3:
            interrupts.requested = "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "end_step", signalled)
        patch.setattr(JaxBackend, "stop", lambda self: stopped.append(stop(self)))
        with pytest.raises(RunInterrupted, match="stopped by SIGTERM: step 3 is saved"):
            distill.train(with_models(async_config(), models), tmp_path, interrupts)
    assert stopped and not rollout_threads()
    again = distill.train(with_models(async_config(), models), tmp_path)
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (result.student / weights).read_bytes()
    assert read_metrics(tmp_path) == read_metrics(workdir)


def test_overlap_needs_devices_of_its_own(tmp_path):
    config = async_config()
    config.policy.generation.colocated.enabled = True
    expect_refusal(config, tmp_path / "run", "async_steps=2", "colocated.enabled=False")


@pytest.mark.parametrize("may", [False, True, 2])
def test_a_backend_of_ones_own_says_how_far_it_samples_ahead(may, monkeypatch):
    name = f"own_ahead_{may}"

    @register_backend(name)
    class Own:
        samples_ahead = may

        def __init__(self, parts):
            pass

    config = async_config()
    config.policy.generation.colocated.enabled = True
    config.policy.generation.backend, config.plugins = name, ("json",)
    parsed = parse_config(config)
    if may == 2:
        return import_plugins(parsed)
    words = f"async_steps=2.*does not say that it can.*samples_ahead=2.*async_steps={int(may)}$"
    with pytest.raises(UserError, match=words):
        import_plugins(parsed)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2}, {"data": 1, "fsdp": -1}])
def test_commands_that_train_nothing_have_the_samplers_processes_too(sizes):
    config = separate_config()
    config.mesh.update(sizes)
    config.policy.generation.colocated.whole_processes = True  # of which there is one
    with open_session(parse_config(config), trains=False) as session:
        assert session.mesh.devices.size == jax.device_count()


# ---------------------------------------------------------------------------------- bad input


def expect_refusal(config: ConfigDict, workdir: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        distill.train(config, workdir)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not workdir.exists(), "nothing may be written"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler_devices": 8}, ["sampler_devices=8", "none of 8 devices", "at most 7"]),
        ({"sampler_devices": 3, "tensor": 5}, ["3 devices", "mesh.tensor=5", "multiple of 5"]),
        ({"data": 8}, ["mesh.data=8", "4 devices", "4 of 8 devices to the sampler, 4 remain"]),
        ({"sampler_devices": 4, "enabled": True}, ["sampler_devices=4", "enabled=False"]),
        ({"whole_processes": True}, ["whole_processes=True", "only this one"]),
        ({"whole_processes": True, "enabled": True}, ["whole_processes=True", "enabled=False"]),
    ],
)
def test_devices_that_cannot_be_split_that_way(tmp_path, changes, words):
    config = separate_config()
    for key, value in changes.items():
        section = config.mesh if key in config.mesh else config.policy.generation.colocated
        section[key] = value
    expect_refusal(config, tmp_path / "run", *words)


def test_one_device_cannot_be_split(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None])
    expect_refusal(separate_config(), tmp_path / "run", "only 1", "colocated.enabled=True")


def test_weights_go_from_many_devices_to_few_shard_by_shard(monkeypatch):
    """As of two processes with four devices each, which are all this one's here."""
    trainer = make_mesh(fsdp=6, devices=[jax.devices()[i] for i in (0, 1, 2, 4, 5, 6)])
    sampler = make_sampler_mesh(trainer, [jax.devices()[i] for i in (3, 7)], tensor=2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    staged = NamedSharding(make_staging_mesh(trainer, sampler), P(None, "tensor"))
    weights = np.arange(24.0).reshape(4, 6)
    copied = copy_to_mesh({"w": jax.device_put(weights, staged)}, sampler)["w"]
    assert copied.sharding == NamedSharding(sampler, P(None, "tensor"))
    np.testing.assert_array_equal(copied, weights)
    halves = {shard.device.id: shard.data[0, 0].item() for shard in copied.addressable_shards}
    assert halves == {3: 0, 7: 3}


class Device(NamedTuple):
    id: int
    process_index: int


def test_each_process_gives_the_sampler_its_last_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices = [Device(i, i // 4) for i in range(8)]

    def split(count, devices=devices):
        colocated = Colocated(enabled=False, sampler_devices=count)
        return split_devices(Generation(colocated=colocated), devices)

    assert [[x.id for x in each] for each in split(0)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [x.id for x in split(2)[1]] == [3, 7]
    for count in (1, 6):
        with pytest.raises(UserError, match=f"={count} does not suit 2 processes.* choose 2 or 4$"):
            split(count)
    with pytest.raises(UserError, match="only 1 of a process"):
        split(0, [Device(0, 0), Device(1, 1)])


def test_the_last_processes_give_the_sampler_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    devices = [Device(i, i % 4) for i in range(8)]  # on TPUs, in an order of their own

    def split(count, devices=devices):
        colocated = Colocated(enabled=False, sampler_devices=count, whole_processes=True)
        return split_devices(Generation(colocated=colocated), devices)

    assert [[x.id for x in each] for each in split(0)] == [[0, 4, 1, 5], [2, 6, 3, 7]]
    assert [x.id for x in split(2)[1]] == [3, 7]
    with pytest.raises(UserError, match="=1 does not suit 4 processes.* choose 2 or 4$"):
        split(1)
    assert [len(each) for each in split(1, devices[:4])] == [3, 1], "each may have but one"
