"""The decode loop's attention to the cache: the kernel for TPU against plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_test import EOS, PAD, VOCAB, model
from flax import nnx
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from tiny_models import num_bytes, num_programs
from tpu_compiler import needs_tpu_compiler, num_kernels, temporary_bytes, tpu_mesh

from distill.base.mesh import make_mesh
from distill.base.sharding import SAMPLER_RULES, named_sharding, param_shardings
from distill.kernels.attention import AttentionSpec
from distill.kernels.decode_attention import Kernel
from distill.models.cache import AttentionCache
from distill.models.decoding import UNROLLED_LAYERS, Part, attend_part, make_loop_weights
from distill.models.facts import LayerKind, ModelConfig, Recurrent
from distill.models.rope import Rope
from distill.models.transformer import Transformer
from distill.sampling import cache as caches
from distill.sampling import programs
from distill.sampling.attention import prefix_attention, resolve_attention
from distill.sampling.choice import SamplingParams
from distill.sampling.engine import Engine, EngineConfig
from distill.sampling.request import RolloutRequest

BLOCK, SIZE = 128, 304  # three blocks, the last one beyond the end of the cache
LENGTHS = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 200, SIZE]
LAYERS, LAYER, SPARE_SLOTS = 3, 1, 2
INTERPRETED = Kernel(block=BLOCK, interpret=True)
# Rounding of the weights and values of an average, in units of the values.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


def random_cache(heads, width, dtype, int8=False, lengths=LENGTHS, parts=1) -> AttentionCache:
    random = np.random.default_rng(0)
    rows = LAYERS, parts, len(lengths) // parts + SPARE_SLOTS, heads
    k_lpckhs = jnp.asarray(random.normal(0, 2, (*rows, width, SIZE)), dtype)
    v_lpcksh = jnp.asarray(random.normal(0, 1, (*rows, SIZE, width)), dtype)
    return AttentionCache.encode(k_lpckhs, v_lpcksh, int8)


def random_queries(heads, group, width, dtype, lengths=LENGTHS):
    shape = len(lengths), heads, group, width
    return jnp.asarray(np.random.default_rng(1).normal(0, 1, shape), dtype)


def kinds_of(q_bkgh, spec):
    return {"full": LayerKind(spec, None, q_bkgh.shape[1], q_bkgh.shape[-1])}


def attend(attention, q_bkgh, cache, lengths_pw, spec=None, size=SIZE):
    spec = spec or AttentionSpec(q_bkgh.shape[-1] ** -0.5)
    arguments = {"full": cache}, jnp.asarray(lengths_pw), size, q_bkgh.dtype, kinds_of(q_bkgh, spec)
    prefix_of = prefix_attention(attention, *arguments)

    def attended(layer):
        prefix = prefix_of("full", layer)
        return attend_part(q_bkgh, prefix, spec) if isinstance(prefix, Part) else prefix(q_bkgh)

    return jax.jit(attended)(LAYER)


def assert_same(actual, expected, dtype):
    assert actual.values_bkgh.dtype == actual.log_sum_bkg.dtype == jnp.float32
    for mine, reference in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, group, width", [(2, 6, 128), (2, 7, 64), (3, 1, 16), (1, 9, 256)])
def test_same_values_as_plain_xla(heads, group, width, dtype, int8):
    cache = random_cache(heads, width, dtype, int8)
    q_bkgh = random_queries(heads, group, width, dtype)
    actual, expected = (attend(x, q_bkgh, cache, [LENGTHS]) for x in (INTERPRETED, "xla"))
    assert_same(actual, expected, dtype)
    assert (actual.log_sum_bkg[0] == -jnp.inf).all() and (actual.values_bkgh[0] == 0).all()
    assert len(np.unique(np.asarray(actual.log_sum_bkg[1:]))) > 7


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
def test_scale_and_soft_cap(int8):
    """Sinks are not the kernel's: the decode loop adds them to its sums."""
    dtype, spec = "float32", AttentionSpec(0.3, soft_cap=2.0, sinks=True)
    cache, q_bkgh = random_cache(2, 64, dtype, int8), random_queries(2, 3, 64, dtype)
    actual, expected = (attend(x, q_bkgh, cache, [LENGTHS], spec) for x in (INTERPRETED, "xla"))
    assert_same(actual, expected, dtype)
    plain = attend("xla", q_bkgh, cache, [LENGTHS])
    assert np.abs(expected.values_bkgh - plain.values_bkgh).max() > 0.1


def test_what_stands_behind_the_end_of_a_row_does_not_matter():
    heads, group, width, dtype = 2, 6, 128, "float32"
    cache = random_cache(heads, width, dtype)
    ends_c = np.array([*LENGTHS, *[0] * SPARE_SLOTS])
    behind_cs = np.arange(SIZE) >= ends_c[:, None]
    garbage = AttentionCache(
        jnp.where(behind_cs[:, None, None], jnp.nan, cache.k_lpckhs),
        jnp.where(behind_cs[:, None, :, None], jnp.nan, cache.v_lpcksh),
    )
    q_bkgh = random_queries(heads, group, width, dtype)
    assert_same(
        attend(INTERPRETED, q_bkgh, garbage, [LENGTHS]),
        attend("xla", q_bkgh, cache, [LENGTHS]),
        dtype,
    )


def test_blocks_behind_the_end_of_a_row_are_not_read():
    steps = INTERPRETED.plan(jnp.array(LENGTHS), 2, 128, SIZE, jnp.dtype("bfloat16"))
    visited = list(zip(steps.slot_i.tolist(), steps.block_i.tolist(), strict=True))
    assert visited[: steps.count] == [
        *[(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1)],
        *[(5, 0), (5, 1), (6, 0), (6, 1), (7, 0), (7, 1), (7, 2)],
    ]


@pytest.mark.parametrize("int8", [False, True], ids=["exact", "int8"])
def test_kernel_is_free_of_races_and_reads_nothing_uninitialised(int8):
    """In Pallas' simulation of a TPU, whose memory is full of NaN until written."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    lengths, dtype = [130, 0, 256, 5], "float32"
    cache = random_cache(2, 128, dtype, int8, lengths)
    # The simulation reads no block that goes beyond the end of the cache.
    cache = cache.map(lambda x, axes: jax.lax.slice_in_dim(x, 0, 2 * BLOCK, axis=axes.position))
    q_bkgh = random_queries(2, 6, 128, dtype, lengths)
    kernel = Kernel(block=BLOCK, interpret=interpret)
    actual, expected = (
        attend(x, q_bkgh, cache, [lengths], size=2 * BLOCK) for x in (kernel, "xla")
    )
    assert_same(actual, expected, dtype)
    assert interpret_pallas_call.races is not None  # that is, the detector ran
    assert not interpret_pallas_call.races.races_found


def test_sharded_over_parts_and_heads():
    heads, group, width, dtype = 4, 3, 16, "float32"
    lengths_pw = np.reshape(LENGTHS, (2, -1))
    cache = random_cache(heads, width, dtype, int8=True, parts=2)
    q_bkgh = random_queries(heads, group, width, dtype)
    with jax.set_mesh(make_mesh(1, 2, 2, devices=jax.devices()[:4])):
        actual = attend(INTERPRETED, q_bkgh, cache, lengths_pw)
        assert actual.values_bkgh.sharding.shard_shape((8, 4, 3, 16)) == (4, 2, 3, 16)
    assert_same(actual, attend("xla", q_bkgh, cache, lengths_pw), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [2, UNROLLED_LAYERS + 1], ids=["unrolled", "scanned"])
def test_the_engine_samples_alike(num_layers):
    """Greedily, on two parts with more rows than slots, some of several blocks."""
    random, mesh = np.random.default_rng(3), make_mesh(2, 1, 2, devices=jax.devices()[:4])
    graphdef, params = model(num_layers)
    params = jax.device_put(params, param_shardings(params, mesh, SAMPLER_RULES))
    lengths = random.integers(1, 180, 20)
    request = RolloutRequest(
        tuple(random.integers(4, VOCAB, length).astype(np.int32) for length in lengths),
        np.arange(20),
        SamplingParams(max_length=40, greedy=True),
        max_lengths=np.where(lengths > 80, 5, random.integers(10, 40, 20)),  # the last are short
    )

    def sample(attention):
        sizes = EngineConfig(max_length=220, num_slots=8, attention=attention)
        engine = Engine(graphdef, sizes, eos_ids=(EOS,), pad_id=PAD, vocab_size=VOCAB)
        with jax.set_mesh(mesh):
            rollout, _ = engine.generate(params, request)
        return rollout, num_programs(engine)

    expected, programs_of_xla = sample("xla")
    actual, programs_of_kernel = sample(INTERPRETED)
    np.testing.assert_array_equal(actual.tokens_br, expected.tokens_br)
    np.testing.assert_allclose(actual.log_probs_br, expected.log_probs_br, atol=5e-5)
    assert len(np.unique(expected.tokens_br)) > 10
    assert programs_of_kernel < programs_of_xla  # none for each bucket of the cache


def test_what_cannot_run_is_said():
    spec = AttentionSpec(0.1)
    assert resolve_attention(None, 128, spec) == "xla"
    with pytest.raises(ValueError, match="'pallas' cannot run on cpu: it needs a TPU from v5e"):
        resolve_attention("pallas", 128, spec)
    with pytest.raises(ValueError, match="attention='flash' is unknown: choose one of xla, pallas"):
        resolve_attention("flash", 128, spec)
    with pytest.raises(ValueError, match="2 parts on 1 groups of devices"):
        cache = random_cache(1, 16, "float32", parts=2)
        kinds = {"full": LayerKind(spec, None, 1, 16)}
        lengths_pw = jnp.array([[1], [2]])
        prefix_attention(INTERPRETED, {"full": cache}, lengths_pw, SIZE, jnp.float32, kinds)


QWEN = ModelConfig(  # 1.5B, but for its depth
    family="qwen2",
    vocab_size=151936,
    num_layers=2,
    model_width=1536,
    num_heads=12,
    num_kv_heads=2,
    head_width=128,
    ffn_width=8960,
    tied=True,
    qkv_bias=True,
    qk_norm=None,
    rms_eps=1e-6,
    rope=Rope(1e6),
    max_positions=32768,
)
SLOTS, STEPS = 64, 32


def compile_decoding(mesh, attention, config=QWEN, int8=False):
    """The decode program for slots of 2048 positions, and the bytes of a device's cache."""
    sizes = EngineConfig(max_length=2048, int8=int8)

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            shardings,
        )

    with jax.set_mesh(mesh):
        parts = mesh.shape["data"]
        options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        shapes = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))
        graphdef, weights = nnx.split(shapes, nnx.Param)
        weights = placed(weights, param_shardings(weights, mesh, SAMPLER_RULES))
        arguments = config, parts, SLOTS, sizes.cache_size, jnp.bfloat16, int8
        cache = jax.eval_shape(lambda: caches.make_cache(*arguments))
        specs = caches.partition_specs(cache)
        cache = placed(cache, jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x), specs))
        numbers = jax.ShapeDtypeStruct((parts, SLOTS), jnp.int32, sharding=named_sharding(mesh))
        rows = programs.Rows(
            *[numbers] * 4,
            key_pw2=jax.ShapeDtypeStruct((parts, SLOTS, 2), jnp.uint32),
            running_pw=jax.ShapeDtypeStruct((parts, SLOTS), bool),
        )
        facts = programs.ModelFacts(graphdef, (151645,), 151665, int8, attention)
        decode = jax.jit(
            lambda weights, *arrays: programs.decode_rows(
                facts,
                weights,
                make_loop_weights(facts.merge(weights)),
                *arrays,
                SamplingParams(max_length=1024),
                sizes.cache_size,
                STEPS,
            ),
            donate_argnums=1,
        )
        stop_at = jax.ShapeDtypeStruct((2,), jnp.int32)
        program = decode.lower(weights, cache, rows, stop_at).compile()
    return program, num_bytes(cache) // mesh.size


@pytest.mark.slow
@needs_tpu_compiler
class TestCompiledForTpu:
    """By the real compiler. Anything of the size of the cache would be a copy of it."""

    @pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    @pytest.mark.parametrize(
        "heads, group, width, int8",
        [(2, 6, 128, False), (2, 6, 128, True), (2, 7, 64, False), (8, 4, 128, False)],
    )
    def test_alone(self, topology, heads, group, width, int8):
        mesh, size = tpu_mesh(topology, 1, 1, 1), EngineConfig(max_length=2048).cache_size

        def attend(q_bkgh, cache, layer, lengths_pw):
            spec = AttentionSpec(width**-0.5, soft_cap=50.0)
            arguments = {"full": cache}, lengths_pw, size, q_bkgh.dtype, kinds_of(q_bkgh, spec)
            return prefix_attention(None, *arguments)("full", layer)(q_bkgh)

        cache = jax.eval_shape(
            lambda: AttentionCache.encode(
                jnp.zeros((2, 1, SLOTS, heads, width, size), jnp.bfloat16),
                jnp.zeros((2, 1, SLOTS, heads, size, width), jnp.bfloat16),
                int8,
            )
        )
        q_bkgh = jax.ShapeDtypeStruct((SLOTS, heads, group, width), jnp.bfloat16)
        numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1, SLOTS))]
        with jax.set_mesh(mesh):
            program = jax.jit(attend).lower(q_bkgh, cache, *numbers).compile()
        assert num_kernels(program) == 1
        assert temporary_bytes(program) < 0.1 * num_bytes(cache)

    @pytest.mark.parametrize(
        "topology, heads, block", [("v5e:2x2", 2, 256), ("v6e:2x2", 2, 512), ("v5e:2x2", 8, 128)]
    )
    def test_a_block_takes_as_long_as_a_step(self, topology, heads, block):
        cache = heads, 128, 2176, jnp.dtype("bfloat16")
        with jax.set_mesh(tpu_mesh(topology, 1, 1, 1)):
            steps = jax.eval_shape(lambda: Kernel().plan(jnp.array([2176]), *cache))
        assert steps.block == block

    @pytest.mark.parametrize("topology, int8", [("v5e:2x2", False), ("v6e:2x2", True)])
    def test_whole_decode_program(self, topology, int8):
        mesh = tpu_mesh(topology, 1, 1, 1)
        program, cache_bytes = compile_decoding(mesh, None, int8=int8)
        plain, _ = compile_decoding(mesh, "xla", int8=int8)
        assert num_kernels(program) == 2 and num_kernels(plain) == 0
        # Plain XLA cuts the layers out of the stack once per call, and makes bfloat16 of int8.
        saved = temporary_bytes(plain) - temporary_bytes(program)
        assert saved > cache_bytes * (1.5 if int8 else 0.9)

    def test_scanned_layers_on_several_devices(self):
        config = dataclasses.replace(QWEN, num_layers=UNROLLED_LAYERS + 1)
        program, cache_bytes = compile_decoding(tpu_mesh("v5e:2x2", 2, 1, 2), None, config)
        assert num_kernels(program) == 1
        assert temporary_bytes(program) < 0.5 * cache_bytes

    @pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
    def test_states_beside_keys(self, topology):
        """Layers of Qwen3.5; a loop carries its own copy of the states, and no other."""
        periods = UNROLLED_LAYERS // 4 + 1
        sizes, pattern = Recurrent(16, 16, 128, 128, taps=4), ("recurrent",) * 3 + ("full",)
        config = dataclasses.replace(QWEN, num_layers=4 * periods, pattern=pattern, recurrent=sizes)
        program, _ = compile_decoding(tpu_mesh(topology, 1, 1, 1), None, config)
        assert num_kernels(program) == 1
        states = 3 * periods * SLOTS * 16 * 128 * 128 * 4
        assert states < temporary_bytes(program) < 2.5 * states

    def test_heads_that_cannot_be_tiled_are_left_to_xla(self):
        with jax.set_mesh(tpu_mesh("v5e:2x2", 1, 1, 1)):
            spec, window = AttentionSpec(0.1), AttentionSpec(0.1, window=8)
            assert resolve_attention(None, 128, spec) == Kernel()
            assert resolve_attention("pallas", 128, spec) == Kernel()
            assert resolve_attention(None, 100, spec) == "xla"
            assert resolve_attention(None, 128, window) == "xla"
            with pytest.raises(ValueError, match="heads of width 100: it needs a multiple of 16"):
                resolve_attention("pallas", 100, spec)
        with jax.set_mesh(tpu_mesh("v4:2x2x1", 1, 1, 1)):
            assert resolve_attention(None, 128, spec) == "xla"
