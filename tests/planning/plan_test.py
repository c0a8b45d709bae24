"""Plans against what runs really allocate, compilers really make, and users really type."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_models import model_config
from tiny_runs import random_model, tiny_config, with_models

import configs.math_cl
import distill
from distill import trainer
from distill.base import topology
from distill.base.errors import UserError
from distill.base.sharding import bytes_per_device, make_abstract_mesh, make_mesh
from distill.base.topology import CHIPS, GPUS, SLICES, parse_topology
from distill.batches.packing import place
from distill.build.layout import build_layout
from distill.build.models import abstract_model
from distill.build.session import Session, open_session
from distill.build.teachers import abstract_teacher
from distill.config.parse import parse_config
from distill.models.checkpoints.load import load_model_config
from distill.models.published import PUBLISHED
from distill.planning import changes, costs, programs
from distill.planning.collectives import sent_bytes
from distill.planning.outlook import estimate
from distill.planning.programs import compile_train_step, make_arrays
from distill.planning.run import plan
from distill.planning.subject import Subject, find_subject, fit_to_devices, working_sizes
from distill.sampling.slots import Slots

ROOT = Path(__file__).parents[2]
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is missing"
)


def flagship():
    return configs.math_cl.get_config()


def subject_of(config, name) -> Subject:
    return fit_to_devices(find_subject(parse_config(config)), parse_topology(name).count)


# ----------------------------------------------------------------- against what a run allocates


def with_shapes(config):
    """Models in which weights, moments and activations all weigh something."""
    sizes = dict(num_layers=3, vocab_size=512)
    config.policy.model_name = random_model(model_width=64, **sizes)
    config.distillation.teacher_model_path = random_model(model_width=128, **sizes)
    return config


@pytest.mark.slow
def test_figures_are_what_a_run_allocates(tmp_path, monkeypatch):
    """Every figure of a plan within 10% of what the first device holds in a real run."""
    config = with_shapes(tiny_config(max_steps=1))
    config.data.validation.max_samples = 0
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.policy.train_global_batch_size, config.policy.train_micro_batch_size = 32, 16
    config.policy.max_total_sequence_length = longest_prompt(config) + 12
    held = watch(monkeypatch)
    distill.train(config, tmp_path / "run")
    outlook = plan(config, "cpu:8")
    memory = outlook.memory
    allocated = {
        "student": held["state"].params,
        "optimizer": held["state"].opt_state,
        "teacher": held["teacher"],
        "batch": held["batch"],
        "sampler": held["sampler"],
        "cache": held["cache"],
        "loop_weights": held["loop_weights"],
    }
    figures = {name: on_first_device(arrays) for name, arrays in allocated.items()}
    assert jax.tree.leaves(held["loop_weights"])  # of a model as shallow as this one
    figures |= {name: held[name] for name in ("update", "prefill", "decode")}
    for name, size in figures.items():
        assert size > 0 and getattr(memory, name) == pytest.approx(size, rel=0.1), name
    update = sum(figures[name] for name in ("student", "optimizer", "teacher", "batch", "sampler"))
    assert memory.peaks["update"] == pytest.approx(update + figures["update"], rel=0.1)
    _, prompts, size = held["reading"]
    summed = costs.estimated_forward_sent(outlook.subject, prompts * size)
    layers = outlook.subject.student.num_layers
    summed *= (2 * layers + 1) / (2 * layers)  # and the embeddings, whose rows are split as well
    assert sum(outlook.compiled["prefill"].sent.values()) == pytest.approx(summed, rel=0.05)


def longest_prompt(config) -> int:
    """As wide as the run will pad prompts: a plan reckons with prompts that fill their room."""
    return Session(parse_config(config)).prompts.prompt_width


def watch(monkeypatch) -> dict:
    """Copies of what the run gives its programs, and what the compiler says of these."""
    held = {}
    make_train_step, allocate = trainer.make_train_step, Slots.allocate

    def watched_make(*args, **options):
        step = make_train_step(*args, **options)

        def watched(state, teacher_params, batch):
            memory = step.lower(state, teacher_params, batch).compile().memory_analysis()
            held.update(state=jax.tree.map(jnp.copy, state), teacher=teacher_params, batch=batch)
            held["update"] = temporaries(memory)
            return step(state, teacher_params, batch)

        return watched

    def watched_allocate(slots, weights, *sizes):
        allocate(slots, weights, *sizes)
        held.update(sampler=weights, cache=slots.cache)
        prefill, decode = slots._prefill, slots._decode

        def keep_largest(name, lowered):
            size = temporaries(lowered.compile().memory_analysis())
            held[name] = max(size, held.get(name, 0))

        def watched_prefill(weights, tokens_pgs, lengths_pg):
            keep_largest("prefill", prefill.lower(weights, tokens_pgs, lengths_pg))
            held["reading"] = tokens_pgs.shape
            return prefill(weights, tokens_pgs, lengths_pg)

        def watched_decode(weights, layers, *rest):
            keep_largest("decode", decode.lower(weights, layers, *rest))
            held.update(loop_weights=layers, cache=jax.tree.map(jnp.copy, rest[0]))
            return decode(weights, layers, *rest)

        slots._prefill, slots._decode = watched_prefill, watched_decode

    monkeypatch.setattr(trainer, "make_train_step", watched_make)
    monkeypatch.setattr(Slots, "allocate", watched_allocate)
    return held


def temporaries(memory) -> int:
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + new


def on_first_device(arrays) -> int:
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(arrays)
        for shard in array.addressable_shards
        if shard.device == device
    )


def test_abstract_shapes_say_how_large_a_shard_is():
    mesh = make_abstract_mesh(2, 2, 2)
    subject = Subject(parse_config(flagship()), *[PUBLISHED["Qwen/Qwen2.5-0.5B"].config] * 2, 100)
    subject = fit_to_devices(dataclasses.replace(subject, config=split(subject.config, 2, 2, 2)), 8)
    arrays = make_arrays(subject, mesh, mesh)
    weights = costs.num_weights(subject.student)
    assert bytes_per_device(arrays.state.params) == pytest.approx(weights * 4 / 4, rel=1e-3)
    assert bytes_per_device(arrays.sampler) == pytest.approx(weights * 2 / 2, rel=1e-3)


def split(config, data, fsdp, tensor):
    mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor)
    return dataclasses.replace(config, mesh=mesh)


@pytest.mark.parametrize("offload", ["none", "host", "layers"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1), (1, 4, 2)])
def test_8_bit_teacher_is_laid_out_as_a_run_loads_it(models, sizes, offload):
    """Leaf by leaf, scales included, where the train step takes it from."""
    config = with_models(tiny_config(), models)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config.teacher.precision, config.teacher.offload = "int8", offload
    config.teacher.split_over_data = offload == "none"
    config = parse_config(config)
    with open_session(config) as session:
        loaded = session.load_teacher().fetch()
    model = load_model_config(session.teacher_folder)[0]
    planned = abstract_teacher(config, model, session.mesh).params
    assert jax.tree.structure(planned) == jax.tree.structure(loaded)
    leaves = jax.tree_util.tree_leaves_with_path(loaded)
    assert sum(path[-1].name == "scale" for path, _ in leaves) == 7
    for (path, real), shape in zip(leaves, jax.tree.leaves(planned), strict=True):
        assert (shape.shape, shape.dtype) == (real.shape, real.dtype), path
        assert shape.sharding.is_equivalent_to(real.sharding, real.ndim), path
        assert shape.sharding.memory_kind == real.sharding.memory_kind, path


# -------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    "collective, expected",
    [
        (lambda x: jax.lax.psum(x, "i"), 2 * 7 / 8 * 4096),
        (lambda x: jax.lax.all_gather(x, "i"), 7 * 4096),
        (lambda x: jax.lax.psum_scatter(x.reshape(8, -1), "i"), 7 / 8 * 4096),
        (lambda x: jax.lax.ppermute(x, "i", [(j, (j + 1) % 8) for j in range(8)]), 4096),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "collective-permute"],
)
def test_bytes_sent_in_loops_of_a_compiled_program(collective, expected):
    """1024 floats per device, in a loop of 5 turns within one of 3."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def turn(x, _):
        return x + jnp.sum(collective(x)), None

    def program(x):
        twice = lambda x, _: jax.lax.scan(turn, x, None, 5)  # noqa: E731
        return jax.lax.scan(lambda x, _: (twice(x, None)[0], None), x, None, 3)[0]

    spec = PartitionSpec("i")
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones(8 * 1024)).compile().as_text()
    assert sum(sent_bytes(text, 8).values()) == pytest.approx(15 * expected, rel=0.01)


TPU_PROGRAM = """
%fused_start (p.0: bf16[8,4]) -> (bf16[8,4], bf16[8,16]) {
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[8,4], bf16[8,16]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.1: bf16[8,4]) -> bf16[8,16] {
  ROOT %all-gather.2 = bf16[8,16]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
}

%condition (s.0: (u32[], bf16[8,4])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8)
  %s.0 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = u32[]{:T(128)} get-tuple-element(%s.0), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%gte.1, %constant.1), direction=LT
}

%body (s.1: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %s.1 = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.2 = u32[]{:T(128)} get-tuple-element(%s.1), index=0
  %gte.3 = bf16[8,4]{1,0} get-tuple-element(%s.1), index=1
  %constant.2 = u32[]{:T(128)} constant(2)
  %add.1 = u32[]{:T(128)} add(%gte.2, %constant.2)
  %permute.1 = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}) collective-permute-start(%gte.3), \
channel_id=8, source_target_pairs={{0,1},{1,0}}
  %permute.2 = bf16[8,4]{1,0} collective-permute-done(%permute.1)
  %fusion.1 = bf16[8,16]{1,0} fusion(%gte.3), kind=kLoop, calls=%async_collective_fusion.1
  ROOT %tuple.1 = (u32[], bf16[8,4]) tuple(%add.1, %permute.2)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %start.1 = (bf16[8,4], bf16[8,16]) fusion(%x), kind=kCustom, calls=%fused_start
  %while.1 = (u32[]{:T(128)}, bf16[8,4]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = bf16[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_tpu_programs_overlap_gathers_and_count_in_steps():
    """A gather that goes on beside a loop counts once; 8 in steps of 2 are 4 turns."""
    sent = sent_bytes(TPU_PROGRAM, num_devices=8)
    assert sent == {"all-gather": 3 / 4 * 256, "collective-permute": 4 * (64 + 2)}


def test_collectives_of_one_channel_are_all_counted():
    """As shard_map's are: a sum over 8 devices, then a maximum, then a gather."""
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def program(x):
        return jax.lax.all_gather(jax.lax.pmax(jnp.sin(jax.lax.psum(x, "i")), "i"), "i")

    spec = PartitionSpec("i")
    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones(8 * 1024)).compile().as_text()
    sent = sent_bytes(text, 8)
    assert sent == {"all-reduce": 2 * 2 * 7 / 8 * 4096, "all-gather": 7 * 4096}


@pytest.mark.slow
def test_loops_over_rows_of_three_lengths_count_as_full_rows_run_them():
    """Against each length alone, padded: what one and two microbatches of it send."""
    mesh, model = make_mesh(2, 2, 2), model_config("qwen2")

    def planned(rows: int, at_once: int, length: int, *, dynamic: bool = False):
        config = tiny_config()
        config.policy.train_global_batch_size, config.policy.train_micro_batch_size = rows, at_once
        config.policy.max_total_sequence_length = length
        config.distillation.generate_strategy.max_length = 8
        config.policy.dynamic_batching.enabled = dynamic
        config.policy.dynamic_batching.sequence_length_round = 4
        subject = Subject(split(parse_config(config), 2, 2, 2), model, model, 30)
        subject = fit_to_devices(subject, 8)
        sent = compile_train_step(subject, make_arrays(subject, mesh, mesh), mesh).sent
        return subject, sum(sent.values())

    rows, longest = 32, 44
    subject, sent = planned(rows, 8, longest, dynamic=True)
    layout = build_layout(subject.config.policy, longest, mesh)
    assert [(shape.rows, shape.length) for shape in layout.shapes] == [(28, 12), (12, 24), (8, 44)]
    placements = place(np.full(rows, longest), layout)
    expected = {"sent": 0.0, "flops": 0.0}
    for shape, placement in zip(layout.shapes, placements, strict=True):
        turns = len(placement.sequence_i) / shape.rows
        alone, once = planned(shape.rows, shape.rows, shape.length)
        _, twice = planned(2 * shape.rows, shape.rows, shape.length)
        # What every loop sends before its first turn, it sends without any turn.
        expected["sent"] += once + (turns - 1) * (twice - once)
        expected["flops"] += turns * update_flops(alone)
    # Not exactly: norms and counts, outside of all loops, are in `expected` three times.
    assert sent == pytest.approx(expected["sent"], rel=2e-3)
    assert update_flops(subject) == pytest.approx(expected["flops"], rel=1e-6)


def update_flops(subject: Subject) -> float:
    return costs.update_phase(subject, 0.0).flops


# ------------------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize(
    "name, weights",
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
    ],
)
def test_published_shapes_have_the_published_number_of_weights(name, weights):
    config = PUBLISHED[name].config
    options = dict(dtype="float32", param_dtype="float32", remat="none", max_length=8)
    model = abstract_model(config, name, make_abstract_mesh(1, 1, 1), **options)
    assert sum(x.size for x in jax.tree.leaves(model.params)) == weights
    assert costs.num_weights(config) == pytest.approx(weights, rel=1e-3)


def test_operations_are_twice_the_weights_per_token_and_pass():
    """With short rows, where attention counts for nothing."""
    config = flagship()
    config.policy.max_total_sequence_length = 8
    config.distillation.generate_strategy.max_length = 4
    subject = subject_of(config, "gpu:h100x8")
    parts, tokens = costs.flops(subject), costs.count_tokens(subject)
    student, teacher = (
        model.num_layers * costs.layer_weights(model) for model in subject.models.values()
    )
    assert parts["teacher"] == pytest.approx(2 * teacher * tokens.total, rel=1e-3)
    assert parts["student"] == pytest.approx(6 * student * tokens.total, rel=1e-3)
    assert parts["recomputation"] == pytest.approx(parts["student"] / 3)
    assert parts["loss"] == 64 * 4 * 151665 * (6 * 1536 + 2 * 5120)
    generated = 2 * student * 64 * 8 + 2 * 1536 * 151665 * 64 * 5
    assert parts["generation"] == pytest.approx(generated, rel=1e-3)


def test_phases_are_bound_by_the_slowest_of_three():
    outlook = estimate(subject_of(flagship(), "gpu:h200x8"), parse_topology("gpu:h200x8"))
    update, generation = outlook.bounds.values()
    parts = costs.flops(outlook.subject)
    assert update == (
        "compute",
        pytest.approx((sum(parts.values()) - parts["generation"]) / 8 / GPUS["h200"].flops),
    )
    # Every turn reads all weights of the sampler.
    assert generation[0] == "memory" and generation[1] > 2048 * 2 * 1.54e9 / GPUS["h200"].bandwidth
    assert outlook.seconds == update[1] + generation[1]


def test_larger_batches_are_planned_where_the_mesh_has_more_parts():
    subject = subject_of(flagship(), "v5e:16x16")
    policy = subject.config.policy
    assert (policy.train_micro_batch_size, policy.train_global_batch_size) == (256, 256)
    assert any("--config.policy.train_global_batch_size=256" in note for note in subject.notes)


def test_across_nodes_the_adapters_bound_the_network():
    assert parse_topology("gpu:h100x8").network == 450e9
    assert parse_topology("gpu:h100x16").network == 400e9


def test_slices_are_of_known_chips_and_grow():
    assert SLICES.keys() == CHIPS.keys()
    for kind, sizes in SLICES.items():
        counts = [parse_topology(f"{kind}:{size}").count for size in sizes]
        assert counts == sorted(set(counts))


# ---------------------------------------------------------------- what would help, what is best


def test_remedies_really_fit():
    """All that the backward pass may keep is too much; less of it, or of other things, is not."""
    config = flagship()
    config.policy.activation_checkpointing = "none"
    topology_ = parse_topology("gpu:h100x4")
    outlook = estimate(subject_of(config, "gpu:h100x4"), topology_)
    assert not outlook.fits
    remedies = changes.find_remedies(outlook)
    assert {"policy.activation_checkpointing": "dots"} in [each.values for each in remedies]
    for remedy in remedies:
        assert remedy.outlook.fits
        for key, value in remedy.values.items():
            section, _, name = key.rpartition(".")
            (getattr(config, section) if section else config)[name]  # a key that a run knows
            assert f"--config.{key}={value}" in remedy.words


def test_when_no_single_change_suffices_several_do(monkeypatch):
    config = flagship()
    config.policy.activation_checkpointing = "none"
    outlook = estimate(subject_of(config, "gpu:h100x8"), parse_topology("gpu:h100x8"))
    kinds = changes._more_checkpointing, changes._smaller_microbatches, lambda outlook: iter(())
    alone = [each.outlook.memory.peak for kind in kinds for each in kind(outlook)]
    chip = dataclasses.replace(GPUS["h100"], memory=0.95 * min(alone))
    monkeypatch.setitem(topology.GPUS, "h100", chip)
    monkeypatch.setattr(changes, "_KINDS", kinds)
    (remedy,) = changes.find_remedies(outlook)
    assert len(remedy.values) == 2 and remedy.outlook.memory.peak <= chip.memory


def test_where_compiling_refutes_a_size_the_next_is_tried(monkeypatch):
    config = flagship()
    config.policy.activation_checkpointing = "none"
    outlook = estimate(subject_of(config, "v5e:4x4"), parse_topology("v5e:4x4"))
    monkeypatch.setattr(changes, "_KINDS", (changes._other_meshes, changes._more_devices))
    monkeypatch.setattr(changes, "_fits", lambda outlook, correction: True)
    tried = []

    def compile_programs(subject, topology):  # no real one is sure to refute a size
        tried.append((subject.sizes.fsdp, subject.sizes.tensor))
        made = estimate(subject, topology)
        memory = dataclasses.replace(made.memory, update=0 if len(tried) == 3 else 1e12)
        return dataclasses.replace(made, memory=memory)

    monkeypatch.setattr(changes, "compile_programs", compile_programs)
    mesh, devices = changes.find_remedies(outlook)
    assert len(tried) == len(set(tried)) == 3
    assert (mesh.values["mesh.fsdp"], mesh.values["mesh.tensor"]) == tried[-1]
    assert devices.words == "--topology=v5e:4x8"


def test_sweep_ranks_all_meshes():
    topology_ = parse_topology("gpu:h200x8")
    subject = subject_of(flagship(), "gpu:h200x8")
    best, tried = changes.sweep(subject, topology_)
    assert len(best) == changes.COMPILED and tried > 10
    assert [each.seconds for each in best] == sorted(each.seconds for each in best)
    assert all(each.fits for each in best)
    assert best[0].seconds <= estimate(subject, topology_).seconds


def test_sweep_compiles_the_best_few(models, capsys):
    config = with_models(tiny_config(), models)
    best = plan(config, "cpu:4", tries_others=True)
    assert best.compiled.keys() == {"update", "prefill", "decode"}
    assert len(capsys.readouterr().out.splitlines()) == 2 + changes.COMPILED


# --------------------------------------------------------------------------- what users type


def command(*arguments: str) -> subprocess.CompletedProcess:
    shell = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "distill.plan", *arguments],
        cwd=ROOT, env=shell, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_this_host_is_divided_into_as_many_devices_as_asked():
    done = command("--config=configs/arithmetic.py", "--topology=cpu:4")
    assert done.returncode == 0, done.stderr
    assert "compiled in: update" in done.stdout


def test_exit_status_of_what_fits():
    done = command("--config=configs/math_cl.py", "--topology=gpu:h200x8")
    assert done.returncode == 0, done.stderr
    assert "planned with its published shape" in done.stdout and ": fits" in done.stdout


def test_exit_status_of_what_does_not_fit_and_of_its_remedy():
    asked = ["--config=configs/math_cl.py", "--topology=gpu:h100x1"]
    done = command(*asked)
    assert done.returncode == 3 and "does not fit" in done.stdout, done.stderr
    remedy = re.search(r"^  (--topology=\S+)", done.stdout, re.MULTILINE)[1]
    assert command(asked[0], remedy).returncode == 0


def test_exit_status_of_nonsense():
    done = command("--config=configs/math_cl.py", "--topology=v7:4x4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    for known in ("v5p", "v5e", "v6e", "tpu7x", "cpu:N", "gpu:h200xN"):
        assert known in done.stderr


@pytest.mark.parametrize(
    "changes_, name, pattern",
    [
        ({"mesh.data": 3}, "gpu:h200x8", "does not match 8 devices"),
        ({"mesh.tensor": 4}, "gpu:h200x8", "mesh.tensor=4 does not divide .*heads, 2.*are 1, 2$"),
        ({"mesh.fsdp": 3, "mesh.data": 1}, "gpu:h200x3", "fsdp=3 does not divide the teacher's"),
        ({"policy.model_name": "Qwen/Qwen9"}, "gpu:h200x8", "Qwen9 is not known here.*Qwen2.5"),
        ({"policy.max_total_sequence_length": 65536}, "gpu:h200x8", "32768 positions"),
        ({}, "cpu:9", "asks for 9 devices.*XLA_FLAGS"),
        ({}, "gpu:h200", "unknown topology 'gpu:h200': known are"),
    ],
)
def test_what_can_not_be_planned_is_said_in_one_line(changes_, name, pattern):
    config = flagship()
    config.update_from_flattened_dict(changes_)
    with pytest.raises(UserError, match=pattern) as caught:
        plan(config, name)
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    advice = f'pip install "jax[tpu]=={jax.__version__}"'
    with pytest.raises(UserError, match=re.escape(advice)):
        plan(flagship(), "v5p:4x4x4")


def test_sizes_that_work_divide_both_models():
    subject = subject_of(flagship(), "gpu:h200x8")
    assert working_sizes(subject, "tensor") == [1, 2]  # 12 heads over 2
    assert 512 in working_sizes(subject, "fsdp")  # widths 1536 and 5120


# --------------------------------------------------------------------------- real compilers


@pytest.mark.slow
def test_time_to_compile_does_not_grow_with_depth(nothing_compiled_before):
    """The train step, from nothing, 2 and 64 layers; processor time, the better of 2."""
    mesh = make_mesh(2, 2, 2)

    def compile_seconds(num_layers: int) -> float:
        jax.clear_caches()
        model = dataclasses.replace(model_config("qwen2"), num_layers=num_layers)
        config = tiny_config()
        subject = Subject(split(parse_config(config), 2, 2, 2), model, model, 30)
        arrays = make_arrays(subject, mesh, mesh)
        start = time.process_time()
        compile_train_step(subject, arrays, mesh)
        return time.process_time() - start

    seconds = {2: [], 64: []}
    for _ in range(2):
        for layers in seconds:
            seconds[layers].append(compile_seconds(layers))
    shallow, deep = min(seconds[2]), min(seconds[64])
    assert deep < 1.3 * shallow, (deep, shallow)


@pytest.mark.slow
@needs_tpu_compiler
def test_flagship_on_a_slice_of_tpus(capsys):
    """32B and 1.5B weights on 64 chips, by the real compiler; docs/scaling.md has other slices."""
    outlook = plan(flagship(), "v6e:8x8")
    memory, (update, generation) = outlook.memory, outlook.phases
    assert outlook.fits and not any(each.failure for each in outlook.compiled.values())
    assert memory.teacher == pytest.approx(2 * 32.76e9 / 64, rel=0.01)
    assert memory.student == pytest.approx(4 * 1.544e9 / 64, rel=0.01)
    assert memory.optimizer == pytest.approx(2 * memory.student, rel=0.01)
    assert memory.sampler == pytest.approx(2 * 1.544e9, rel=0.01)  # whole: every turn reads it
    # The score matrices of a layer and the gathered heads among them.
    assert 1e9 < memory.update < 12e9
    assert 0 < memory.prefill < 1e9 and 0 < memory.decode < 1e9
    # Weights are gathered layer by layer, in loops: each turn must have been counted.
    assert update.sent == pytest.approx(costs.estimated_sent(outlook.subject), rel=0.25)
    assert 0 < generation.sent < update.sent
    printed = capsys.readouterr().out
    assert "planned with 64" in printed and ": fits" in printed


@needs_tpu_compiler
def test_programs_that_the_compiler_refuses_for_their_size_are_measured_all_the_same():
    """Three matrices of 17 GB on a chip of 16 GB, one of them an argument."""
    mesh = make_mesh(devices=topology.described_tpu("v5e:2x2")[:1])
    layout = jax.NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32, sharding=layout)
    program = programs._compile(lambda: jax.jit(lambda x: (x @ x) @ x).lower(x), x, mesh, [])
    assert "memory" in program.failure and program.sent is None
    assert program.temporaries > 1 << 34


def test_what_a_refused_program_uses_includes_its_arguments():
    message = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded ..."
    assert programs._refused_temporaries(message, held=2**32) == 16 * 2**30


@needs_tpu_compiler
def test_a_chip_of_two_devices():
    assert parse_topology("tpu7x:2x2x1").count == len(topology.described_tpu("tpu7x:2x2x1")) == 8


@needs_tpu_compiler
def test_slices_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="there is no TPU slice v5e:3x5.*such as v5e:4x4"):
        plan(flagship(), "v5e:3x5")


def test_microbatches_of_tokens_are_changed_by_their_own_key():
    """Where train_mb_tokens is set, it and not the unused number of rows is raised and lowered."""
    config = flagship()
    config.policy.sequence_packing.train_mb_tokens = 8 * 3072
    subject = subject_of(config, "v5e:4x4")
    policy = subject.config.policy
    assert policy.sequence_packing.train_mb_tokens == 16 * 3072
    assert (policy.train_micro_batch_size, policy.train_global_batch_size) == (32, 64)
    assert any("sequence_packing.train_mb_tokens=49152" in note for note in subject.notes)
    config.policy.sequence_packing.train_mb_tokens = 64 * 3072
    outlook = estimate(subject_of(config, "v5e:4x4"), parse_topology("v5e:4x4"))
    values = [change.values for change in changes._smaller_microbatches(outlook)]
    assert values == [{"policy.sequence_packing.train_mb_tokens": n * 3072} for n in (32, 16)]
