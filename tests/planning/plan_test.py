"""Plans against what runs really allocate, compilers really make, and users really type."""

import dataclasses
import importlib.util
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny_models import model_config
from tiny_plans import flagship, workload_of, workload_on_mesh
from tiny_runs import random_model, tiny_config, with_models

import distill
from distill import trainer
from distill.base import topology
from distill.base.errors import UserError
from distill.base.mesh import make_mesh, make_row_mesh
from distill.base.sharding import bytes_per_device
from distill.base.topology import CHIPS, GPUS, SLICES, parse_topology
from distill.build.devices import build_mesh, build_sampler_mesh
from distill.build.scratch import make_random_model_like
from distill.build.session import Session, open_session
from distill.build.teachers import abstract_teacher
from distill.config.parse import parse_config
from distill.config.schema import all_teachers
from distill.data.arithmetic import CHARACTERS
from distill.data.tokenizer import character_tokenizer
from distill.models.checkpoints.source import load_model_config
from distill.models.facts import Experts, ModelConfig
from distill.planning import changes, costs, programs, run
from distill.planning.arrays import make_arrays
from distill.planning.costs import FLOAT32
from distill.planning.estimate import compile_plan, estimate
from distill.planning.programs import compile_update
from distill.sampling.slots import STEPS_PER_CALL, Slots

ROOT = Path(__file__).parents[2]
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is missing"
)


# ----------------------------------------------------------------- against what a run allocates


def with_shapes(config):
    """Models in which weights, moments and activations all weigh something."""
    sizes = dict(num_layers=3, vocab_size=512)
    config.policy.model_name = random_model(model_width=64, **sizes)
    config.distillation.teacher_model_path = random_model(model_width=128, **sizes)
    return config


def with_mixtures(config, folder):
    """The same of mixtures of experts."""
    like = json.loads((ROOT / "configs/tiny/qwen3_moe.json").read_text())
    models = {"student": 64, "teacher": 128}
    for name, width in models.items():
        sizes = dict(hidden_size=width, moe_intermediate_size=width, num_experts=4)
        sizes |= dict(num_attention_heads=2, head_dim=width // 2)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(like | sizes))
        tokenizer = character_tokenizer(CHARACTERS)
        make_random_model_like(folder / name, tokenizer, path, vocab_size=512)
    return with_models(config, {name: str(folder / name) for name in models})


@pytest.mark.slow
@pytest.mark.parametrize("mixtures", [False, True])
def test_figures_are_what_a_run_allocates(mixtures, tmp_path, monkeypatch):
    """Every figure of a plan within 10% of what the first device holds in a real run."""
    config = tiny_config(max_steps=1)
    config = with_mixtures(config, tmp_path) if mixtures else with_shapes(config)
    config.data.validation.max_samples = 0
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.policy.generation.width = 1 if mixtures else 2
    config.policy.train_global_batch_size, config.policy.train_micro_batch_size = 32, 16
    config.policy.max_total_sequence_length = longest_prompt(config) + 12
    held = watch(monkeypatch)
    distill.train(config, tmp_path / "run")
    made = run.plan(config, "cpu:8")
    memory = made.memory
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
    assert held["shape"] == made.arrays.sampler.prefill
    summed = costs.estimated_sent(made.workload, made.arrays)["prefill"]
    _, prompts, length = made.arrays.sampler.prefill
    # And the embeddings, whose rows are split as well: summed over two devices, sent twice.
    summed += prompts * length * made.workload.student.model_width * FLOAT32
    assert sum(made.compiled["prefill"].sent.values()) == pytest.approx(summed, rel=0.05)


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
        prefill, decode = slots.prefill, slots._decode

        def keep_largest(name, lowered):
            size = temporaries(lowered.compile().memory_analysis())
            held[name] = max(size, held.get(name, 0))

        def watched_prefill(weights, tokens_pgs, lengths_pg):
            keep_largest("prefill", prefill.lower(weights, tokens_pgs, lengths_pg))
            held["shape"] = tokens_pgs.shape
            return prefill(weights, tokens_pgs, lengths_pg)

        def watched_decode(weights, layers, *rest):
            keep_largest("decode", decode.lower(weights, layers, *rest))
            held.update(loop_weights=layers, cache=jax.tree.map(jnp.copy, rest[0]))
            return decode(weights, layers, *rest)

        slots.prefill, slots._decode = watched_prefill, watched_decode

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
        loaded = session.load_teachers()[""].fetch()
    model = load_model_config(session.teacher_folders[""])[0]
    planned = abstract_teacher(config, all_teachers(config)[""], model, session.mesh).params
    assert jax.tree.structure(planned) == jax.tree.structure(loaded)
    leaves = jax.tree_util.tree_leaves_with_path(loaded)
    assert sum(path[-1].name == "scale" for path, _ in leaves) == 7
    for (path, real), shape in zip(leaves, jax.tree.leaves(planned), strict=True):
        assert (shape.shape, shape.dtype) == (real.shape, real.dtype), path
        assert shape.sharding.is_equivalent_to(real.sharding, real.ndim), path
        assert shape.sharding.memory_kind == real.sharding.memory_kind, path


# ------------------------------------------------------------------------------------ topologies


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
    made = estimate(workload_of(config, "gpu:h100x4"), topology_)
    assert not made.fits
    remedies = changes.find_remedies(made)
    assert {"policy.activation_checkpointing": "dots"} in [each.values for each in remedies]
    for remedy in remedies:
        assert remedy.plan.fits
        for key, value in remedy.values.items():
            section, _, name = key.rpartition(".")
            (getattr(config, section) if section else config)[name]  # a key that a run knows
            assert f"--config.{key}={value}" in remedy.words


def test_when_no_single_change_suffices_several_do(monkeypatch):
    config = flagship()
    config.policy.activation_checkpointing = "none"
    made = estimate(workload_of(config, "gpu:h100x8"), parse_topology("gpu:h100x8"))
    all_kinds = changes.kinds
    monkeypatch.setattr(changes, "kinds", lambda plan: all_kinds(plan)[:2])
    monkeypatch.setattr(changes, "_more_devices", lambda plan: iter(()))
    alone = [
        each.plan.memory.peak
        for values in changes.kinds(made)
        for each in changes._changed(made, values)
    ]
    chip = dataclasses.replace(GPUS["h100"], memory=0.95 * min(alone))
    monkeypatch.setitem(topology.GPUS, "h100", chip)
    (remedy,) = changes.find_remedies(made)
    assert len(remedy.values) == 2 and remedy.plan.memory.peak <= chip.memory


def test_a_teacher_by_scores_stays_as_it_was_scored():
    """With another precision, a run would refuse them as another teacher's."""
    config = flagship()
    config.distillation.lambda_, config.teacher.scores = 0.0, "scores"
    made = estimate(workload_of(config, "gpu:h100x8"), parse_topology("gpu:h100x8"))
    values = [each for kind in changes.kinds(made) for each in kind]
    assert not [each for each in values if any(key.startswith("teacher.") for key in each)]


def test_where_compiling_refutes_a_size_the_next_is_tried(monkeypatch):
    config = flagship()
    config.policy.activation_checkpointing = "none"
    made = estimate(workload_of(config, "v5e:4x4"), parse_topology("v5e:4x4"))
    all_kinds = changes.kinds
    monkeypatch.setattr(changes, "kinds", lambda plan: all_kinds(plan)[-1:])  # meshes
    monkeypatch.setattr(changes, "_fits", lambda made, correction: True)
    tried = []

    def compile_plan(workload, topology):  # no real one is sure to refute a size
        tried.append((workload.mesh.shape["fsdp"], workload.mesh.shape["tensor"]))
        plan = estimate(workload, topology)
        memory = dataclasses.replace(plan.memory, update=0 if len(tried) == 3 else 1e12)
        return dataclasses.replace(plan, memory=memory)

    monkeypatch.setattr(changes, "compile_plan", compile_plan)
    mesh, devices = changes.find_remedies(made)
    assert len(tried) == len(set(tried)) == 3
    assert (mesh.values["mesh.fsdp"], mesh.values["mesh.tensor"]) == tried[-1]
    assert devices.words == "--topology=v5e:4x8"


def test_sweep_ranks_all_meshes():
    topology_ = parse_topology("gpu:h200x8")
    workload = workload_of(flagship(), "gpu:h200x8")
    best, tried = changes.sweep(workload, topology_)
    assert len(best) == changes.COMPILED and tried > 10
    assert [each.seconds for each in best] == sorted(each.seconds for each in best)
    assert all(each.fits for each in best)
    assert best[0].seconds <= estimate(workload, topology_).seconds


def test_a_faster_layout_of_the_sampler_is_named(capsys):
    config = flagship()
    config.distillation.generate_strategy.num_generations = 8
    run.plan(config, "gpu:h200x8")
    line = re.search(
        r"generation would take at least ([\d.]+) s, estimated, with (.*): a decode step reads "
        r"([\d.]+) GB of weights instead of 3.09",
        capsys.readouterr().out,
    )
    seconds, keys, weights = line.groups()
    for key in keys.split():
        name, _, value = key.removeprefix("--config.policy.generation.").partition("=")
        config.policy.generation[name] = int(value)
    made = run.plan(config, "gpu:h200x8")
    assert made.bounds["generation"][1] == pytest.approx(float(seconds), rel=1e-3)
    assert made.memory.sampler == pytest.approx(float(weights) * 1e9, rel=0.01)
    assert "generation would take" not in capsys.readouterr().out


def test_sweep_compiles_the_best_few(models, capsys):
    config = with_models(tiny_config(), models)
    best = run.sweep(config, "cpu:4")
    assert best.compiled.keys() == {"update", "prefill", "decode"}
    assert len(capsys.readouterr().out.splitlines()) == 2 + changes.COMPILED


def test_sizes_that_work_divide_both_models():
    workload = workload_of(flagship(), "gpu:h200x8")
    plan = estimate(workload, parse_topology("gpu:h200x8"))
    assert changes.working_sizes(plan, "tensor") == [1, 2]  # 12 heads over 2
    assert 512 in changes.working_sizes(plan, "fsdp")  # widths 1536 and 5120
    assert 512 in changes.working_sizes(plan, "context")  # and rows of 3072 tokens
    assert changes.working_sizes(plan, "data") == [1]  # which cuts no weights


# --------------------------------------------------------------------------- real compilers


@pytest.mark.slow
def test_time_to_compile_does_not_grow_with_depth(nothing_compiled_before):
    """The train step, from nothing, 2 and 64 layers; processor time."""
    mesh = make_mesh(2, 2, 2)

    def compile_seconds(num_layers: int) -> float:
        jax.clear_caches()
        model = dataclasses.replace(model_config("qwen2"), num_layers=num_layers)
        config = tiny_config()
        workload = workload_on_mesh(config, model, 2, 2, 2)
        arrays = make_arrays(workload, mesh, mesh)
        start = time.process_time()
        compile_update(workload, arrays, mesh)
        return time.process_time() - start

    deep, shallow = compile_seconds(64), compile_seconds(2)  # what is done once counts against it
    if deep >= 1.3 * shallow:
        deep, shallow = min(deep, compile_seconds(64)), min(shallow, compile_seconds(2))
    assert deep < 1.3 * shallow, (deep, shallow)


@needs_tpu_compiler
def test_a_sampler_that_splits_mlps_gathers_rows_and_no_weights():
    config, topology_ = flagship(), parse_topology("v5p:2x2x2")
    config.policy.generation.tensor, config.policy.generation.width = 2, 4
    workload, devices = workload_of(config, topology_.name), topology_.devices()
    mesh = build_mesh(workload.config, devices)
    sampler_mesh = build_sampler_mesh(workload.config.policy.generation, mesh, devices)
    arrays = make_arrays(workload, mesh, sampler_mesh)
    weights = bytes_per_device(arrays.sampler.weights)
    assert weights == pytest.approx(0.68e9, rel=0.01)  # of 3.09
    sent = programs.compile_sampler(workload, arrays, sampler_mesh)["decode"].sent
    rows = arrays.sampler.slots * sampler_mesh.shape["width"]
    of_step = rows * workload.student.num_layers * workload.student.model_width * 2
    assert 0 < sum(sent.values()) / STEPS_PER_CALL < 8 * of_step < weights / 10


def test_flagship_on_a_slice_of_tpus():
    """32B and 1.5B weights on 64 chips; docs/scaling.md has what the compiler says of slices."""
    made = estimate(workload_of(flagship(), "v6e:8x8"), parse_topology("v6e:8x8"))
    memory, (update, generation) = made.memory, made.phases
    assert made.fits and any("planned with 64" in note for note in made.workload.notes)
    assert memory.teacher == pytest.approx(2 * 32.76e9 / 64, rel=0.01)
    assert memory.student == pytest.approx(4 * 1.544e9 / 64, rel=0.01)
    assert memory.optimizer == pytest.approx(2 * memory.student, rel=0.01)
    assert memory.sampler == pytest.approx(2 * 1.544e9, rel=0.01)  # whole: each step reads it
    assert 0 < generation.sent < update.sent


@pytest.mark.slow
@needs_tpu_compiler
def test_weights_are_gathered_layer_by_layer_on_tpus():
    """In loops: each step of them must have been counted, and their arrays once."""
    sizes = dict(model_width=1024, ffn_width=3072, num_heads=8, head_width=128, num_layers=12)
    config = tiny_config()
    config.policy.precision = config.teacher.precision = "bfloat16"
    workload = workload_on_mesh(config, model_config("qwen2", **sizes, vocab_size=4096), 1, 4, 1)
    made = compile_plan(workload, parse_topology("v6e:2x2"))
    assert made.fits and not any(each.failure for each in made.compiled.values())
    memory, (update, generation) = made.memory, made.phases
    estimated = costs.estimated_sent(made.workload, made.arrays)
    assert update.sent == pytest.approx(estimated["update"], rel=0.25)
    # Less than the weights of all layers, which are never gathered together.
    assert memory.update < 4 * memory.student
    assert 0 < memory.prefill < 1e9 and 0 < memory.decode < 1e9
    assert 0 < generation.sent < update.sent


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize(
    ("name", "sizes_of_mesh", "per_token", "exchange"),
    [
        ("v5p:2x2x1", (1, 2, 2), 2, None),
        ("v5p:2x2x2", (1, 2, 1, 1, 4), 2, "ragged-all-to-all"),
        ("v5p:2x2x2", (1, 2, 1, 1, 4), 8, "all-gather"),
    ],
)
def test_mixture_of_experts_on_tpus(name, sizes_of_mesh, per_token, exchange):
    """Teacher, train step, prefill and decode loop; nothing takes work for all experts."""
    experts = Experts(64, per_token, 128, normalized=True)
    sizes = dict(model_width=256, num_heads=2, num_kv_heads=2, head_width=128, vocab_size=512)
    model = model_config("qwen3", **sizes, experts=experts)
    workload = workload_on_mesh(tiny_config(), model, *sizes_of_mesh)
    made = compile_plan(workload, parse_topology(name))
    assert not any(each.failure for each in made.compiled.values())
    if exchange:
        assert all(each.sent[exchange] > 0 for each in made.compiled.values())
        assert made.memory.teacher < 1.1 * made.memory.sampler / 2 + 2e6
    # One gradient of experts' weights, were rows masked for each of them: 64 * 288 * 256 * 4 bytes.
    # Where experts are cut, a device has gradients of those it has, of a round and of all.
    more = 3 * made.memory.sampler if exchange else 64 * 288 * 256 * 4
    assert 0 < made.memory.update < 3 * made.memory.gradients + more


def model_of(layers):
    """With layers of two kinds."""
    sizes = dict(hidden_size=256, num_attention_heads=2, head_dim=128, vocab_size=512)
    sizes |= {"qwen3_5": dict(linear_key_head_dim=128, linear_value_head_dim=128)}.get(layers, {})
    like = json.loads((ROOT / f"configs/tiny/{layers}.json").read_text())
    model = ModelConfig.from_hf(like | sizes | {"max_position_embeddings": 65536}, layers)
    assert len(model.kinds) == 2
    return model


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize("layers, name", [("qwen3_5", "v6e:2x2"), ("gemma3", "v5p:2x2x1")])
def test_recurrent_and_sliding_layers_on_tpus(layers, name):
    """Teacher, train step, prefill and decode loop of layers of two kinds."""
    workload = workload_on_mesh(tiny_config(), model_of(layers), 1, 2, 2)
    made = compile_plan(workload, parse_topology(name))
    assert made.compiled.keys() == {"update", "prefill", "decode"}
    assert not any(each.failure for each in made.compiled.values())


def compiled_for_long_rows(model, length, name, fsdp, context):
    """A step of one row for each group of devices, and the bytes that each of them needs."""
    config = tiny_config()
    config.policy.max_total_sequence_length = length
    config.distillation.generate_strategy.max_length = length // 2
    config.policy.train_global_batch_size = config.policy.train_micro_batch_size = fsdp
    config.policy.precision = config.teacher.precision = "bfloat16"
    config.policy.activation_checkpointing = "full"
    config.policy.sequence_packing.enabled = True
    workload = workload_on_mesh(config, model, 1, fsdp, 1, context)
    devices = parse_topology(name).devices()[: fsdp * context]
    mesh = make_mesh(devices=devices, data=1, fsdp=fsdp, context=context)
    arrays = make_arrays(workload, mesh, make_row_mesh(mesh))
    program = compile_update(workload, arrays, mesh)
    held = bytes_per_device((arrays.state, arrays.weights_of_teachers, arrays.batch))
    return program, held + program.temporaries


@pytest.mark.slow
@needs_tpu_compiler
def test_devices_that_share_rows_need_less_memory_each():
    sizes = dict(model_width=1024, num_heads=8, head_width=128, ffn_width=3072, vocab_size=8192)
    model = model_config("qwen3", **sizes, max_positions=16384)
    peaks = {n: compiled_for_long_rows(model, 16384, "v5p:2x2x1", 1, n)[1] for n in (1, 4)}
    assert peaks[4] < 0.35 * peaks[1], peaks


@pytest.mark.slow
@needs_tpu_compiler
def test_step_of_long_rows_on_tpus():
    """32,768 tokens to a row, on four devices: full attention beside states."""
    program, _ = compiled_for_long_rows(model_of("qwen3_5"), 32768, "v5p:2x2x2", 2, 4)
    assert not program.failure
    assert program.sent["collective-permute"] > 0


@needs_tpu_compiler
def test_programs_that_the_compiler_refuses_for_their_size_are_measured_all_the_same():
    """Three matrices of 17 GB on a chip of 16 GB, one of them an argument."""
    mesh = make_mesh(devices=topology.described_tpu("v5e:2x2")[:1])
    layout = jax.NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32, sharding=layout)
    program = programs._compile(lambda: jax.jit(lambda x: (x @ x) @ x).lower(x), x, mesh, [])
    assert "memory" in program.failure and program.sent is None
    assert program.temporaries > 1 << 34


def test_a_compiler_that_fails_by_itself_is_quoted():
    def lower():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n  loop_code_motion.cc:1125")

    program = programs._compile(lower, (), make_mesh(devices=jax.devices()[:1]), [])
    assert program.failure == "INTERNAL: RET_CHECK failure loop_code_motion.cc:1125"
    assert program.temporaries is None and program.sent is None
    made = estimate(workload_of(flagship(), "v5p:4x4x4"), parse_topology("v5p:4x4x4"))
    assert made.fits and not made.is_refused
    made = dataclasses.replace(made, compiled={"update": program})
    assert made.is_refused and not made.fits  # and no remedy is looked for


def test_what_a_refused_program_uses_includes_its_arguments():
    message = "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded ..."
    assert programs._refused_temporaries(message, held=2**32) == 16 * 2**30


def test_what_cannot_be_printed_is_planned_all_the_same(models, capsys, monkeypatch):
    """As with a libtpu that is newer than JAX: what is sent is an estimate, and that is said."""

    def fails(compiled):
        raise NotImplementedError("UNIMPLEMENTED")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fails)
    made = run.plan(with_models(tiny_config(), models), "cpu:2")
    assert made.memory.update > 0 and all(each.sent is None for each in made.compiled.values())
    assert made.phases[0].sent == costs.estimated_sent(made.workload, made.arrays)["update"]
    printed = capsys.readouterr().out
    assert "cannot be printed" in printed and f'"jax[tpu]=={jax.__version__}"' in printed


@needs_tpu_compiler
def test_a_chip_of_two_devices():
    assert parse_topology("tpu7x:2x2x1").count == len(topology.described_tpu("tpu7x:2x2x1")) == 8


@needs_tpu_compiler
def test_slices_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="there is no TPU slice v5e:3x5.*such as v5e:4x4"):
        run.plan(flagship(), "v5e:3x5")


def test_microbatches_of_tokens_are_changed_by_their_own_key():
    """Where train_mb_tokens is set, it and not the unused number of rows is raised and lowered."""
    config = flagship()
    config.policy.sequence_packing.train_mb_tokens = 8 * 3072
    workload = workload_of(config, "v5e:4x4")
    policy = workload.config.policy
    assert policy.sequence_packing.train_mb_tokens == 16 * 3072
    assert (policy.train_micro_batch_size, policy.train_global_batch_size) == (32, 64)
    assert any("sequence_packing.train_mb_tokens=49152" in note for note in workload.notes)
    config.policy.sequence_packing.train_mb_tokens = 64 * 3072
    made = estimate(workload_of(config, "v5e:4x4"), parse_topology("v5e:4x4"))
    assert changes.kinds(made)[1] == [
        {"policy.sequence_packing.train_mb_tokens": n * 3072} for n in (32, 16)
    ]
