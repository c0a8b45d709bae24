"""What a step computes, moves and holds, counted from the shapes of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import model_config
from tiny_plans import arrays_of, flagship, workload_of, workload_on_mesh
from tiny_runs import tiny_config

import configs.qwen3
from distill.base.mesh import make_abstract_mesh, make_mesh
from distill.base.sharding import bytes_per_device, param_shardings
from distill.base.topology import GPUS, parse_topology
from distill.batches.packing import place
from distill.build.devices import build_layout
from distill.build.models import abstract_model, on_mesh
from distill.models.cache import ring_size
from distill.models.facts import Recurrent
from distill.models.published import published
from distill.planning import costs
from distill.planning.arrays import make_arrays
from distill.planning.counts import count, cut_sizes
from distill.planning.estimate import estimate
from distill.planning.programs import compile_update
from distill.planning.workload import Workload


@pytest.mark.parametrize(
    "name, weights",
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("Qwen/Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
        ("Qwen/Qwen3.5-35B-A3B", 34_660_610_688),
        ("Qwen/Qwen3.5-122B-A10B", 122_111_526_912),
        ("Qwen/Qwen3.5-397B-A17B", 396_346_350_336),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79_674_391_296),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
        ("allenai/OLMoE-1B-7B-0924-Instruct", 6_919_161_856),
        ("openai/gpt-oss-20b", 20_914_757_184),
        ("openai/gpt-oss-120b", 116_829_156_672),
    ],
)
def test_published_shapes_have_the_published_number_of_weights(name, weights):
    config = published()[name].config
    options = dict(dtype="float32", param_dtype="float32", remat="none", max_length=8)
    model = abstract_model(config, name, make_abstract_mesh(1, 1, 1), **options)
    assert sum(x.size for x in jax.tree.leaves(model.params)) == weights
    assert count(config, model.params).weights == pytest.approx(weights, rel=1e-3)


def test_a_token_passes_the_picked_experts_only():
    config = published()["Qwen/Qwen3-30B-A3B"].config
    options = dict(dtype="float32", param_dtype="float32", remat="none", max_length=8)
    mesh = make_abstract_mesh(1, 1, 2)
    counts = count(config, abstract_model(config, "it", mesh, **options).params)
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    assert counts.layer_weights == 48 * (attention + 2048 * 128 + 8 * 3 * 2048 * 768)
    made_by_experts = 8 * (2 * 768 // 2 + 2048)
    made_by_attention = 128 * (32 + 4 + 4) // 2 + 2048
    assert counts.made == 48 * (made_by_experts + made_by_attention + 128)


@pytest.mark.parametrize(("devices", "sent"), [(8, 7), (32, 31 * (1 - (31 / 32) ** 8))])
def test_tokens_go_to_the_experts_in_the_way_that_sends_less(devices, sent):
    """Of 128 experts, 8 for each token: to all of 8 devices, to those of its experts among 32."""
    config = published()["Qwen/Qwen3-30B-A3B"].config
    options = dict(dtype="float32", param_dtype="float32", remat="none", max_length=8)
    mesh = make_abstract_mesh(expert=devices)
    counts = count(config, abstract_model(config, "it", mesh, **options).params)
    assert counts.summed == pytest.approx(48 * 2048 * sent)
    experts = 48 * 128 * 3 * 2048 * 768
    assert counts.own == counts.weights // devices
    assert counts.used == counts.weights - experts + experts // devices


def test_operations_are_twice_the_weights_per_token_and_pass():
    """With short rows, where attention counts for nothing."""
    config = flagship()
    config.policy.max_total_sequence_length = 8
    config.distillation.generate_strategy.max_length = 4
    workload = workload_of(config, "gpu:h100x8")
    tokens, parts = workload.tokens, costs.flops(workload, arrays_of(workload))
    # Queries and outputs, keys and values, the three of the feed-forward.
    student = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    teacher = 64 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648)
    assert parts["teacher"] == pytest.approx(2 * teacher * tokens.total, rel=1e-3)
    assert parts["student"] == pytest.approx(6 * student * tokens.total, rel=1e-3)
    assert parts["recomputation"] == pytest.approx(parts["student"] / 3)
    assert parts["loss"] == 64 * 4 * 151665 * (6 * 1536 + 2 * 5120)
    generated = 2 * student * 64 * 8 + 2 * 1536 * 151665 * 64 * 5
    assert parts["generation"] == pytest.approx(generated, rel=1e-3)


def test_phases_are_bound_by_the_slowest_of_three():
    workload = workload_of(flagship(), "gpu:h200x8")
    plan = estimate(workload, parse_topology("gpu:h200x8"))
    update, generation = plan.bounds.values()
    parts = costs.flops(workload, plan.arrays)
    assert update == (
        "compute",
        pytest.approx((sum(parts.values()) - parts["generation"]) / 8 / GPUS["h200"].flops),
    )
    # Every decode step reads all weights of the sampler.
    assert generation[0] == "memory" and generation[1] > 2048 * 2 * 1.54e9 / GPUS["h200"].bandwidth
    assert plan.seconds == update[1] + generation[1]


def test_a_sampler_ahead_holds_weights_for_every_batch_under_way():
    plans = []
    for steps in (1, 3):
        config = flagship()
        config.policy.generation.colocated.enabled = False
        config.policy.generation.colocated.whole_processes = steps == 3
        config.policy.generation.async_steps = steps
        config.policy.generation.importance_clip = 2.0
        plans.append(estimate(workload_of(config, "gpu:h200x8"), parse_topology("gpu:h200x8")))
    one, three = (plan.memory for plan in plans)
    assert three.sampler == 3 * one.sampler > 0
    assert three.peaks["generation"] - one.peaks["generation"] == 2 * one.sampler
    assert three.peaks["update"] == one.peaks["update"], "on devices of its own"
    assert {plan.seconds for plan in plans} == {max(x for _, x in plans[0].bounds.values())}


def test_larger_batches_are_planned_where_the_mesh_has_more_parts():
    workload = workload_of(flagship(), "v5e:16x16")
    policy = workload.config.policy
    assert (policy.train_micro_batch_size, policy.train_global_batch_size) == (256, 256)
    assert any("--config.policy.train_global_batch_size=256" in note for note in workload.notes)


def test_abstract_shapes_say_how_large_a_shard_is():
    model = published()["Qwen/Qwen2.5-0.5B"].config
    arrays = arrays_of(workload_on_mesh(flagship(), model, 2, 2, 2))
    counts = arrays.student_counts
    assert bytes_per_device(arrays.state.params) == pytest.approx(counts.weights * 4 / 4, rel=1e-3)
    assert bytes_per_device(arrays.sampler.weights) == pytest.approx(counts.used * 2, rel=1e-3)
    assert counts.own == counts.weights / 4 and counts.used == counts.weights / 2


def imaginary_params(mesh):
    """Of no family that there is: queries of low rank, 5 heads of 8, a gate, 2 x 3 layers."""
    shapes = {
        "embedding": ((40, 16), ("vocab", "embed")),
        "final_norm": ((16,), (None,)),
        "wide": {
            "down": ((3, 16, 4), ("layers", "embed", None)),
            "up": ((3, 4, 6, 8), ("layers", None, "heads", "head_width")),
            "gate": ((3, 16, 6), ("layers", "embed", "heads")),
            "out": ((3, 6, 8, 16), ("layers", "heads", "head_width", "embed")),
            "up_bias": ((3, 6, 8), ("layers", "heads", "head_width")),
        },
        "narrow": {"mix": ((3, 16, 10), ("layers", "embed", "ffn"))},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = nnx.State(
        jax.tree.map(
            lambda x: nnx.Param(jax.ShapeDtypeStruct(x[0], jnp.bfloat16), logical_axes=x[1]),
            shapes,
            is_leaf=is_shape,
        )
    )
    return on_mesh(params, param_shardings(params, mesh))


def test_a_family_is_known_by_its_parameters_alone():
    """Against sums by hand: a new family changes nothing in planning."""
    config = model_config(num_layers=6, model_width=16)
    counts = count(config, imaginary_params(make_abstract_mesh(1, 4, 2)))
    layers = 3 * (16 * 4 + 4 * 48 + 16 * 6 + 48 * 16 + 16 * 10)
    assert counts.layer_weights == layers and counts.weights == layers + 40 * 16
    # Cut two ways but for the low rank, and four ways over the width.
    used = 3 * (16 * 4 + (4 * 48 + 16 * 6 + 48 * 16 + 16 * 10) / 2)
    assert counts.used_of_layers == used and counts.used == used + 40 * 16 / 2
    own = 3 * (16 * 4 / 4 + 4 * 48 / 2 + (16 * 6 + 48 * 16 + 16 * 10) / 8) + 40 * 16 / 8
    assert counts.own == own and counts.used_bytes == 2 * counts.used
    assert counts.attention_width == 3 * 48 and counts.attended == 3 * 24
    assert counts.made == 3 * (4 + (48 + 6 + 10) / 2 + 16)
    assert counts.kept == 3 * (4 + (48 + 6 + 10 + 48) / 2 + 2 * 16)
    assert counts.summed == 3 * 16 / 2


def test_sizes_that_a_mesh_axis_splits():
    params = imaginary_params(make_abstract_mesh(1, 1, 1))
    assert set(cut_sizes(params, "tensor")) == {40, 6, 10}
    assert set(cut_sizes(params, "fsdp")) == {16} and not cut_sizes(params, "data")


def test_attention_within_a_window_costs_its_pairs_only():
    """Pairs counted one by one, of a token with itself half; of a row in four parts, the last."""
    workload = workload_on_mesh(tiny_config(), model_config(), 1, 1, 1)
    counts = arrays_of(workload).student_counts
    length, width = 40, 4 * 8
    for window in (1, 7, 40, 100, None):
        pattern = ("full", "sliding") if window else ("full",)
        model = model_config(pattern=pattern, window=window)
        for parts in (1, 4):
            pairs, start = 0.0, length - length // parts
            for seen in (length, min(window or length, length)):  # of one layer and the other
                of_tokens = [min(i + 1, seen) for i in range(start, length)]
                pairs += parts * (sum(of_tokens) - max(seen - start, 0) / 2)
            assert costs._attention(model, counts, length, parts) == 4 * width * pairs


def test_positions_over_devices_take_memory_for_network():
    made = {}
    for parts in (1, 4):
        config = configs.qwen3.get_config("long")
        config.mesh.context = parts
        made[parts] = estimate(workload_of(config, "gpu:h200x64"), parse_topology("gpu:h200x64"))
    assert made[4].memory.update < 0.5 * made[1].memory.update
    assert made[4].memory.optimizer == made[1].memory.optimizer
    layers, rows, reach, compute = 36 * 4 + 64, 4, 32768 - 8192, 2
    fetched = layers * rows * reach * 2 * 8 * 128 * compute
    sent = {parts: costs.estimated_sent(x.workload, x.arrays) for parts, x in made.items()}
    assert sent[4]["update"] - sent[1]["update"] >= fetched


def test_recorded_experts_are_bytes_of_the_batch():
    """Of a student of 48 layers whose tokens pass 8 experts each."""
    held = {}
    for router_replay in ("off", "compare"):
        config = flagship()
        config.policy.model_name = "Qwen/Qwen3-30B-A3B"
        config.policy.router_replay = router_replay
        made = estimate(workload_of(config, "gpu:h200x8"), parse_topology("gpu:h200x8"))
        held[router_replay] = made.memory.batch
    assert held["compare"] - held["off"] == 64 * 3072 / 8 * 768


def test_a_family_with_windows_is_planned_from_its_own_cache():
    """Facts that no published model has together: rings instead of whole rows, sinks, two norms."""
    facts = dict(
        family="imaginary", norms="both", sinks=True, o_bias=True, tied=False, num_layers=3
    )
    memory = {}
    for pattern in (("full",), ("sliding", "sliding", "full")):
        model = model_config(**facts, pattern=pattern, window=8)
        workload = workload_on_mesh(tiny_config(), model, 2, 2, 2)
        made = estimate(workload, parse_topology("gpu:h100x8"))
        assert made.arrays.student_counts.attention_width == 3 * 4 * 8
        memory[pattern[0]] = made.memory
    sampler = made.arrays.sampler
    size, of_layer = sampler.engine.config.cache_size, memory["full"].cache / 3
    ring = ring_size(model.kinds["sliding"].attention, size)
    assert ring < size and memory["sliding"].cache == of_layer * (1 + 2 * ring / size)
    assert sampler.token_bytes * sampler.slots * size == memory["sliding"].cache
    assert memory["sliding"].student == memory["full"].student


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
        workload = workload_on_mesh(config, model, 2, 2, 2)
        program = compile_update(workload, make_arrays(workload, mesh, mesh), mesh)
        return workload, sum(program.sent.values())

    rows, longest = 32, 44
    workload, sent = planned(rows, 8, longest, dynamic=True)
    layout = build_layout(workload.config.policy, longest, mesh)
    assert [(shape.rows, shape.length) for shape in layout.shapes] == [(28, 12), (12, 24), (8, 44)]
    placements = place(np.full(rows, longest), layout)
    expected = {"sent": 0.0, "flops": 0.0}
    for shape, placement in zip(layout.shapes, placements, strict=True):
        runs = len(placement.sequence_i) / shape.rows
        alone, once = planned(shape.rows, shape.rows, shape.length)
        _, twice = planned(2 * shape.rows, shape.rows, shape.length)
        # What every loop sends before its first microbatch, it sends without any.
        expected["sent"] += once + (runs - 1) * (twice - once)
        expected["flops"] += runs * update_flops(alone)
    # Not exactly: norms and counts, outside of all loops, are in `expected` three times.
    assert sent == pytest.approx(expected["sent"], rel=2e-3)
    assert update_flops(workload) == pytest.approx(expected["flops"], rel=1e-6)


def update_flops(workload: Workload) -> float:
    return costs.update_phase(workload, arrays_of(workload), 0.0).flops


def test_states_are_counted_apart_from_keys_and_values():
    sizes = Recurrent(key_heads=2, value_heads=4, key_width=8, value_width=6, taps=4)
    model = model_config(num_layers=3, pattern=("recurrent", "full"), recurrent=sizes)
    workload = workload_on_mesh(tiny_config(), model, 2, 2, 2)
    made = estimate(workload, parse_topology("gpu:h100x8"))
    sampler = made.arrays.sampler
    itemsize = jnp.dtype(workload.config.policy.precision).itemsize
    # Two layers' states, cut two ways, and inputs of the convolution, which are whole.
    assert sampler.state_bytes == 2 * (4 * 8 * 6 * 4 / 2 + 3 * (2 * 2 * 8 + 4 * 6) * itemsize)
    assert sampler.token_bytes == 2 * 2 * 8 * itemsize / 2  # keys and values of one layer
    size = sampler.engine.config.cache_size
    slot = sampler.token_bytes * size + sampler.state_bytes
    assert made.memory.cache == slot * sampler.slots
    attention_alone = costs._attention(model, made.arrays.student_counts, 40)
    assert attention_alone == 4 * 4 * 8 * 40 * 40 / 2
    per_token = 4 * (2 * 3 * 8 * 6 + 2 * 64 * (8 + 6))
    assert costs._recurrence(model) == 2 * per_token
