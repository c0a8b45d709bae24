"""Every implementation of attention against the definition: values, gradients, meshes, memory."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import needs_hopper
from jax.experimental import topologies

from distill.base.mesh import make_mesh
from distill.base.sharding import named_sharding
from distill.base.topology import described_tpu
from distill.kernels.attention import MOST_SEGMENTS, AttentionSpec, api, attention
from distill.kernels.attention.api import _segments, splash
from distill.kernels.attention.blockwise import BLOCK, _bounds, blockwise_attention
from distill.models.transformer import REMAT_POLICIES

# By dtype: of values and gradients that are of the order of one.
TOLERANCES = {"float32": 2e-5, "bfloat16": 4e-2}


def as_attention(kernel, **options):
    def call(q, k, v, segment_ids_bt, spec, sinks_n=None):
        return kernel(q, k, v, segment_ids_bt, sinks_n, spec=spec, **options)

    return call


IMPLEMENTATIONS = {
    "blockwise": as_attention(blockwise_attention, block=32),
    "one block": as_attention(blockwise_attention),
    "splash": as_attention(splash, interpret=True),
}


def arrays(batch, length, num_heads, num_kv_heads, width, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(batch, length, heads, width) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    shapes.append(shapes[0])
    return [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def segments(batch, length, longest, seed=0):
    """Rows packed with segments of mixed length, the rest of a row being padding, 0."""
    random = np.random.default_rng(seed)
    ids_bt = np.zeros((batch, length), np.int32)
    for row in ids_bt:
        start, number = 0, 1
        while (size := int(random.integers(1, longest))) + start <= length:
            row[start : start + size] = number
            start, number = start + size, number + 1
    return jnp.asarray(ids_bt)


def value_and_gradients(function, q, k, v, cotangent, ids_bt, spec, sinks_n=None):
    @jax.jit
    def run(*inputs):
        def attended(q, k, v, sinks_n):
            return function(q, k, v, segment_ids_bt=ids_bt, sinks_n=sinks_n, spec=spec)

        value, pull = jax.vjp(attended, *inputs)
        return value, *pull(cotangent)

    return [np.asarray(x, np.float32) for x in run(q, k, v, sinks_n) if x is not None]


SCALE = 0.2  # not 16**-0.5, that of most families
PLAIN = AttentionSpec(SCALE)
SINKS = jnp.linspace(-2.0, 3.0, 6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(SCALE),
        AttentionSpec(SCALE, window=1),
        AttentionSpec(SCALE, window=40, soft_cap=1.5),
        AttentionSpec(SCALE, window=40, sinks=True),
        AttentionSpec(SCALE, soft_cap=1.5, sinks=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients(name, spec, packed, dtype):
    # 150 positions are no multiple of any block; three query heads share a key-value head.
    *inputs, cotangent = arrays(2, 150, 6, 2, 16, dtype)
    ids_bt = segments(2, 150, 60) if packed else None
    sinks_n = SINKS if spec.sinks else None
    reference = functools.partial(attention, implementation="reference")
    expected = value_and_gradients(reference, *inputs, cotangent, ids_bt, spec, sinks_n)
    actual = value_and_gradients(IMPLEMENTATIONS[name], *inputs, cotangent, ids_bt, spec, sinks_n)
    for ours, theirs in zip(actual, expected, strict=True):
        tolerance = TOLERANCES[dtype]
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


needs_segments = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 1), reason="JAX before 0.11.1 gives cuDNN wrong keys of segments"
)


@needs_hopper
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_segments)])
@pytest.mark.parametrize("width, length", [(64, 150), (128, 1024)])
def test_cudnn(window, packed, width, length):
    *inputs, cotangent = arrays(2, length, 6, 2, width, "bfloat16")
    ids_bt = segments(2, length, length // 3) if packed else None
    spec = AttentionSpec(SCALE, window=window)
    expected, actual = (
        value_and_gradients(
            functools.partial(attention, implementation=name), *inputs, cotangent, ids_bt, spec
        )
        for name in ("reference", "cudnn")
    )
    for ours, theirs in zip(actual, expected, strict=True):
        tolerance = TOLERANCES["bfloat16"]
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "ids, starts, sizes",
    [
        ([1] * 7 + [2] * 2 + [0] * 31, [0, 7, 9], [7, 2, 31]),
        ([1] * 40, [0], [40]),
        (range(MOST_SEGMENTS + 1), range(MOST_SEGMENTS + 1), [1] * (MOST_SEGMENTS + 1)),
        (range(MOST_SEGMENTS + 2), None, None),
    ],
)
def test_segments_as_cudnn_takes_them(ids, starts, sizes):
    *found, fits = _segments(jnp.asarray(ids))
    assert fits == (starts is not None)
    if fits:
        absent = [-1] * (MOST_SEGMENTS + 1 - len(starts))
        assert [x.tolist() for x in found] == [[*starts, *absent], [*sizes, *absent]]


@needs_hopper
@needs_segments
def test_a_row_of_too_many_segments_is_nan():
    *inputs, _ = arrays(2, 128, 2, 2, 64, "bfloat16")
    ids_bt = jnp.stack([jnp.arange(128), jnp.zeros(128, jnp.int32)])
    attended = np.asarray(
        attention(*inputs, AttentionSpec(SCALE), ids_bt, implementation="cudnn"), np.float32
    )
    assert np.isnan(attended[0]).all() and np.isfinite(attended[1]).all()


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)])
def test_on_a_mesh(sizes):
    """Rows and heads cut over devices; the bounds of the loops are each device's own."""
    *inputs, cotangent = arrays(8, 600, 4, 2, 8)
    ids_bt = segments(8, 600, 300)
    arguments = *inputs, cotangent, ids_bt, AttentionSpec(SCALE, sinks=True), SINKS[:4]
    expected = value_and_gradients(attention, *arguments)
    with jax.set_mesh(make_mesh(*sizes)):
        actual = value_and_gradients(attention, *arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "name, spec, length",
    [
        ("blockwise", AttentionSpec(SCALE), 1200),  # a shard is no multiple of a block
        ("blockwise", AttentionSpec(SCALE, window=5), 16),
        ("reference", AttentionSpec(SCALE, window=310, soft_cap=1.5, sinks=True), 600),
        ("splash", AttentionSpec(SCALE, sinks=True), 600),
        ("splash", AttentionSpec(SCALE, window=310, soft_cap=1.5), 600),
    ],
)
def test_positions_cut_over_devices(name, spec, length, parts, monkeypatch):
    """Segments end at the shards' ends (the first row) and within; a window reaches two shards."""
    *inputs, cotangent = arrays(2, length, 4, 2, 8)
    ids_bt = segments(2, length, length).at[0].set(1 + 4 * jnp.arange(length) // length)
    arguments = *inputs, cotangent, ids_bt, spec, SINKS[:4] if spec.sinks else None
    reference = functools.partial(attention, implementation="reference")
    expected = value_and_gradients(reference, *arguments)
    monkeypatch.setattr(api, "resolve_implementation", lambda *_, **__: name)
    monkeypatch.setitem(api._LOCAL, "splash", functools.partial(splash, interpret=True))
    with jax.set_mesh(make_mesh(data=1, fsdp=4 // parts, tensor=2, context=parts)):
        actual = value_and_gradients(attention, *arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)


def test_cudnn_takes_no_positions_cut_over_devices(monkeypatch):
    monkeypatch.setattr(api, "platform", lambda: "gpu")
    monkeypatch.setattr(api, "cuda_capability", lambda: 9)
    heads = {"packed": False, "width": 64, "dtype": jnp.bfloat16, "cut": True}
    assert api.resolve_implementation(None, PLAIN, **heads) == "blockwise"
    with pytest.raises(ValueError, match="cudnn.*and positions cut over devices: use"):
        api.resolve_implementation("cudnn", PLAIN, **heads)


def compiled_gradients(length, mesh=None, dtype="float32", spec=PLAIN):
    """Of q, k, v of four rows on the mesh, of eight heads of width 128."""

    def loss(q, k, v, ids_bt):
        sinks_n = jnp.zeros(8) if spec.sinks else None
        return attention(q, k, v, spec, ids_bt, sinks_n).astype(jnp.float32).sum()

    def shape(heads, *axes):
        sharding = None if mesh is None else named_sharding(mesh, "batch", None, *axes)
        sizes = (4, length, heads, 128) if axes else (4, length)
        return jax.ShapeDtypeStruct(sizes, dtype if axes else "int32", sharding=sharding)

    inputs = shape(8, "act_heads", None), *[shape(4, "act_kv_heads", None)] * 2, shape(0)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile()


@pytest.mark.parametrize("name", ["one block", "splash"])
def test_dots_does_not_compute_attention_again(name):
    function = functools.partial(
        IMPLEMENTATIONS[name], segment_ids_bt=None, spec=AttentionSpec(SCALE)
    )
    length = {"one block": BLOCK, "splash": 128}[name]  # no loops within attention
    q, k, v, _ = arrays(1, length, 2, 2, 16)

    def gradient_flops(remat):
        def layer(x, _):
            return function(x, k, v), None

        def loss(q):
            step = layer
            if remat != "none":
                step = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
            return jax.lax.scan(step, q, None, length=2)[0].sum()

        return jax.jit(jax.grad(loss)).lower(q).compile().cost_analysis()["flops"]

    flops = {remat: gradient_flops(remat) for remat in REMAT_POLICIES}
    product = 2 * 2 * 16 * length**2
    assert flops["full"] - flops["none"] > product
    assert flops["dots"] - flops["none"] < product / 10


def test_memory_is_linear_in_the_length():
    bytes_of = {n: compiled_gradients(n).memory_analysis().temp_size_in_bytes for n in (1024, 4096)}
    assert bytes_of[4096] < 4.5 * bytes_of[1024], bytes_of
    assert bytes_of[4096] < 4 * 8 * 4096**2  # a byte for each of the scores


def test_blocks_of_other_segments_are_not_computed():
    """Sixteen segments of a block each: the blocks on the diagonal are all there is to enter."""
    ids_bt = jnp.repeat(jnp.arange(16), BLOCK)[None]
    first_i, last_j = _bounds(ids_bt, None, BLOCK)
    assert first_i.tolist() == last_j.tolist() == list(range(16))
    first_i, last_j = _bounds(jnp.zeros_like(ids_bt), 2 * BLOCK, BLOCK)
    assert first_i.tolist() == [max(i - 2, 0) for i in range(16)]
    assert last_j.tolist() == [min(j + 2, 15) for j in range(16)]


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash", "'flash' is unknown: .* blockwise, splash"),
        ("splash", "'splash' cannot run on cpu"),
        ("cudnn", "'cudnn' cannot run on (cpu|gpu) with heads of 8 float32 and packed rows"),
    ],
)
def test_an_implementation_that_cannot_run_is_an_error(name, message):
    *inputs, _ = arrays(1, 8, 2, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention(*inputs, AttentionSpec(SCALE), segments(1, 8, 4), implementation=name)


@pytest.mark.parametrize(
    "platform, accelerated, spec, name",
    [
        ("tpu", "splash", AttentionSpec(SCALE, window=4, soft_cap=2.0, sinks=True), "splash"),
        ("gpu", "cudnn", AttentionSpec(SCALE, window=4), "cudnn"),
        ("gpu", "cudnn", AttentionSpec(SCALE, soft_cap=2.0), "blockwise"),
        ("gpu", "cudnn", AttentionSpec(SCALE, sinks=True), "blockwise"),
    ],
    ids=str,
)
def test_a_kernel_is_chosen_where_it_computes_the_specification(
    platform, accelerated, spec, name, monkeypatch
):
    monkeypatch.setattr(api, "platform", lambda: platform)
    monkeypatch.setattr(api, "is_old_tpu", lambda: False)
    monkeypatch.setattr(api, "cuda_capability", lambda: 9 if platform == "gpu" else 0)
    heads = {"packed": False, "width": 64, "dtype": jnp.bfloat16}
    assert api.resolve_implementation(None, spec, **heads) == name
    if name != accelerated:
        with pytest.raises(ValueError, match=f"{accelerated}.*and (a soft-cap|sinks): use"):
            api.resolve_implementation(accelerated, spec, **heads)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is missing"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_tpu_compiler_takes_the_kernel(topology):
    described_tpu(topology)  # tells libtpu what it would ask the machine
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(1, 2, 2, devices=devices)
    with jax.set_mesh(mesh):
        spec = AttentionSpec(SCALE, window=1024, soft_cap=50.0, sinks=True)
        compiled = compiled_gradients(4096, mesh, "bfloat16", spec)
    assert "tpu_custom_call" in compiled.as_text()
    # Two rows and four heads on a device: the float32 scores would be 512 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 100e6
