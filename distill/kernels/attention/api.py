"""Causal self-attention of packed rows, forward and backward in memory linear in their length.

Shapes: queries q_btnh, keys and values k_btkh and v_btkh, n a multiple of k, all in one dtype;
segment_ids_bt int. A token attends to itself and to tokens of its own row and segment before it, as
its layer's `AttentionSpec` says. Scores and sums are in float32.

Where the mesh cuts positions, a device has keys of positions before its own, too: k_bskh, whose
last are its own. `cudnn` cannot take them.

`implementation`: `reference` (all scores, the definition), `blockwise` (plain XLA, any platform),
`splash` (JAX's Pallas kernel for TPUs), `cudnn` (NVIDIA's library; 16-bit floats, no
soft-cap, no sinks, at most `MOST_SEGMENTS` in a row, and NaN for a row that has more), or None for
the best that computes the specification here. ValueError for one that cannot.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distill.base.sharding import dividing, num_shards, partition_spec
from distill.kernels.attention.blockwise import RESIDUALS, blockwise_attention, cap_scores
from distill.kernels.attention.reach import keys_in_reach
from distill.kernels.attention.spec import AttentionSpec
from distill.kernels.platform import cuda_capability, is_old_tpu, platform

IMPLEMENTATIONS = ("reference", "blockwise", "splash", "cudnn")
LANES = 128  # of a TPU: the kernel takes whole tiles of positions
MOST_SEGMENTS = 32  # of a packed row, padding not counted: what `cudnn` takes memory for


def attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    spec: AttentionSpec,
    segment_ids_bt: jax.Array | None = None,
    sinks_n: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """attended_btnh; rows, positions and heads are cut over the devices of the current mesh.

    `segment_ids_bt=None` makes every row one segment. Padding behind a row's end needs no segment
    of its own: nothing before it can attend to it. `sinks_n` are the scores of `spec.sinks`.
    """
    if spec.sinks != (sinks_n is not None):
        raise ValueError(f"sinks_n must be given where spec.sinks is True, which is {spec.sinks}")
    packed = segment_ids_bt is not None
    batch, length, _, width = q_btnh.shape
    # What the mesh does not divide is whole on its devices.
    rows, positions = dividing("batch", batch), dividing("position", length)
    cut = positions is not None and num_shards("position") > 1
    name = resolve_implementation(
        implementation, spec, packed=packed, width=width, dtype=q_btnh.dtype, cut=cut
    )
    local = functools.partial(_LOCAL[name], spec=spec)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q_btnh, k_btkh, v_btkh, segment_ids_bt, sinks_n)

    def of_device(q_btnh, k_btkh, v_btkh, segment_ids_bt, sinks_n):
        if cut:
            k_btkh, v_btkh, segment_ids_bt = keys_in_reach(
                k_btkh, v_btkh, segment_ids_bt, spec.window
            )
        return local(q_btnh, k_btkh, v_btkh, segment_ids_bt, sinks_n)

    divides = k_btkh.shape[2] % num_shards("act_kv_heads") == 0
    heads, kv_heads = ("act_heads", "act_kv_heads") if divides else (None, None)
    q_spec = partition_spec((rows, positions, heads, None))
    kv_spec = partition_spec((rows, positions, kv_heads, None))
    ids_spec = partition_spec((rows, positions))
    in_specs = q_spec, kv_spec, kv_spec, ids_spec, partition_spec((heads,))
    return jax.shard_map(of_device, in_specs=in_specs, out_specs=q_spec, check_vma=False)(
        q_btnh, k_btkh, v_btkh, segment_ids_bt, sinks_n
    )


def resolve_implementation(
    implementation: str | None,
    spec: AttentionSpec,
    *,
    packed: bool,
    width: int,
    dtype,
    cut: bool = False,
) -> str:
    """The implementation that will run; ValueError when the one asked for cannot.

    `cut`: the positions of a row are, over devices.
    """
    splash = platform() == "tpu" and not is_old_tpu()
    cudnn = _has_cudnn(width, jnp.dtype(dtype), packed)
    cudnn = cudnn and spec.soft_cap is None and not spec.sinks and not cut
    if implementation is None:
        return "splash" if splash else "cudnn" if cudnn else "blockwise"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention {implementation!r} is unknown: choose one of {', '.join(IMPLEMENTATIONS)}, "
            "or None"
        )
    if (implementation == "splash" and not splash) or (implementation == "cudnn" and not cudnn):
        facts = [f"heads of {width} {jnp.dtype(dtype)}"]
        facts += ["packed rows"] * packed + ["a soft-cap"] * (spec.soft_cap is not None)
        facts += ["sinks"] * spec.sinks + ["positions cut over devices"] * cut
        raise ValueError(
            f"attention {implementation!r} cannot run on {platform()} with {' and '.join(facts)}: "
            "use 'blockwise', or None"
        )
    return implementation


def _has_cudnn(width: int, dtype: jnp.dtype, packed: bool) -> bool:
    """Whether cuDNN's flash attention takes such heads: what JAX would check when it compiles."""
    if packed and jax.__version_info__ < (0, 11, 1):
        return False  # JAX reads other segments' keys where query heads share them: its PR 39521
    fits = dtype.itemsize == 2 and width % 8 == 0 and width <= 128
    return fits and cuda_capability() >= (9 if packed else 8)


def attention_mask(
    length: int, segment_ids_bt: jax.Array | None = None, window: int | None = None
) -> jax.Array:
    """mask_bts, True where t attends to s; b is 1 without segments."""
    offset_ts = jnp.arange(length)[:, None] - jnp.arange(length)
    mask_bts = ((offset_ts >= 0) & (offset_ts < (window or length)))[None]
    if segment_ids_bt is not None:
        mask_bts &= segment_ids_bt[:, :, None] == segment_ids_bt[:, None, :]
    return mask_bts


def _reference(q_btnh, k_bskh, v_bskh, segment_ids_bs, sinks_n, *, spec: AttentionSpec):
    batch, length, _, width = q_btnh.shape
    num_keys = k_bskh.shape[1]
    q_btkgh = q_btnh.reshape(batch, length, k_bskh.shape[2], -1, width)
    scores_bkgts = jnp.einsum(
        "btkgh,bskh->bkgts", q_btkgh, k_bskh, preferred_element_type=jnp.float32
    )
    scores_bkgts = cap_scores(scores_bkgts * spec.scale, spec.soft_cap)
    mask_bts = attention_mask(num_keys, segment_ids_bs, spec.window)[:, -length:]
    scores_bkgts = jnp.where(mask_bts[:, None, None], scores_bkgts, -jnp.inf)
    if sinks_n is not None:
        sinks_kg11 = sinks_n.astype(jnp.float32).reshape(*scores_bkgts.shape[1:3], 1, 1)
        sinks_bkgt1 = jnp.broadcast_to(sinks_kg11, (*scores_bkgts.shape[:-1], 1))
        scores_bkgts = jnp.concatenate([scores_bkgts, sinks_bkgt1], axis=-1)
    weights_bkgts = jax.nn.softmax(scores_bkgts, axis=-1)[..., :num_keys].astype(v_bskh.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights_bkgts, v_bskh).reshape(q_btnh.shape)


def _cudnn(q_btnh, k_btkh, v_btkh, segment_ids_bt, _, *, spec: AttentionSpec):
    if segment_ids_bt is not None:
        return _cudnn_packed(q_btnh, k_btkh, v_btkh, segment_ids_bt, spec)
    return jax.nn.dot_product_attention(
        q_btnh,
        k_btkh,
        v_btkh,
        scale=spec.scale,
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation="cudnn",
    )


def _cudnn_packed(q_btnh, k_btkh, v_btkh, segment_ids_bt, spec: AttentionSpec):
    """Row by row: the backward pass takes memory for all segments that its rows may have."""
    # What jax.nn's function calls, which has no argument for segments.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    def row(arrays):
        *qkv, ids_t = arrays
        starts_m, sizes_m, fits = _segments(ids_t)
        sizes_1m, offsets_1m = sizes_m[None], jnp.append(starts_m, -1)[None]
        attended_1tnh = dot_product_attention(
            *(x[None] for x in qkv),
            q_seqlen=sizes_1m,
            kv_seqlen=sizes_1m,
            q_offsets=offsets_1m,
            kv_offsets=offsets_1m,
            scale=spec.scale,
            mask_type=MaskType.PADDING_CAUSAL,
            sliding_window_length=spec.window,
        )
        return jnp.where(fits, attended_1tnh[0], jnp.nan)

    return jax.lax.map(row, (q_btnh, k_btkh, v_btkh, segment_ids_bt))


def _segments(ids_t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First positions and sizes of a row's segments, -1 where it has fewer than MOST_SEGMENTS and
    one for padding, and whether it has not more."""
    length = len(ids_t)
    number_t = jnp.cumsum(jnp.append(0, ids_t[1:] != ids_t[:-1]))
    starts_m = jnp.full(MOST_SEGMENTS + 1, length).at[number_t].min(jnp.arange(length))
    sizes_m = jnp.append(starts_m[1:], length) - starts_m
    starts_m, sizes_m = (jnp.where(starts_m < length, x_m, -1) for x_m in (starts_m, sizes_m))
    return starts_m, sizes_m, number_t[-1] <= MOST_SEGMENTS


def splash(
    q_btnh,
    k_bskh,
    v_bskh,
    segment_ids_bs,
    sinks_n=None,
    *,
    spec: AttentionSpec,
    interpret: bool = False,
):
    """JAX's kernel; `interpret` runs it without a TPU, for tests."""
    (batch, length), num_keys = q_btnh.shape[:2], k_bskh.shape[1]
    if segment_ids_bs is None:
        segment_ids_bs = jnp.zeros((batch, num_keys), jnp.int32)
    size = -(-length // LANES) * LANES
    behind = size - length
    before = -(num_keys + behind) % LANES
    ids_bs = jnp.pad(segment_ids_bs, ((0, 0), (before, behind)), constant_values=-1)

    def heads_first(x_btnh, before):
        x_btnh = jnp.pad(x_btnh, ((0, 0), (before, behind), (0, 0), (0, 0)))
        return x_btnh.swapaxes(1, 2)

    kernel = _splash_kernel(q_btnh.shape[2], (size, ids_bs.shape[1]), spec, interpret)
    q_bnth = heads_first(q_btnh * jnp.asarray(spec.scale, q_btnh.dtype), 0)
    k_bksh, v_bksh = (heads_first(x_bskh, before) for x_bskh in (k_bskh, v_bskh))
    attended_bnth = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, _splash_ids(ids, size), sinks_n))(
        q_bnth, k_bksh, v_bksh, ids_bs
    )
    return attended_bnth.swapaxes(1, 2)[:, :length]


def _splash_ids(ids_s: jax.Array, num_queries: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(ids_s[-num_queries:], ids_s)


def _splash_kernel(num_heads: int, shape: tuple[int, int], spec: AttentionSpec, interpret: bool):
    # Imported here: Pallas is slow to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention

    offset = shape[1] - shape[0]  # of the queries
    mask: splash_attention.Mask
    if spec.window is None:
        mask = splash_attention.CausalMask(shape, offset)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(spec.window - 1, 0), offset=offset)
    block, block_keys = (int(np.gcd(size, 512)) for size in shape)
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * num_heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block_keys,
            block_q_dkv=block,
            block_kv_dkv=block_keys,
            block_kv_dkv_compute=block_keys,
            block_q_dq=block,
            block_kv_dq=block_keys,
        ),
        residual_checkpoint_name=RESIDUALS,
        attn_logits_soft_cap=spec.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


_LOCAL = {
    "reference": _reference,
    "blockwise": blockwise_attention,
    "splash": splash,
    "cudnn": _cudnn,
}
