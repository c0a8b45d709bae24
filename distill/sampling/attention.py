"""How the decode loop attends to what the cache held when it was entered.

`attention` is `xla` (plain, any platform: reads the first `size` positions of every row), `pallas`
(a kernel for TPUs from v5e: reads every row to its own end), a `Kernel` (with another block size,
or interpreted), or None for the best that runs here. An explicit request that cannot run is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill.base.sharding import num_shards, partition_spec
from distill.kernels import decode_attention
from distill.kernels.attention import AttentionSpec
from distill.kernels.decode_attention import Kernel
from distill.kernels.platform import device_kind, is_old_tpu, platform
from distill.models.cache import AttentionCache
from distill.models.decoding import Attended, Part, Prefix
from distill.sampling.cache import partition_specs

IMPLEMENTATIONS = ("xla", "pallas")


def resolve_attention(
    attention: str | Kernel | None, head_width: int, specs: Sequence[AttentionSpec] = ()
) -> str | Kernel:
    """'xla' or the kernel that will run; ValueError when the one asked for cannot.

    `specs` are what the layers' attention computes, where it is more than softmax(q k / sqrt(h)) v.
    """
    if attention is None:
        return "xla" if _obstacle(head_width, specs) else Kernel()
    if attention not in IMPLEMENTATIONS and not isinstance(attention, Kernel):
        raise ValueError(
            f"attention={attention!r} is unknown: "
            f"choose one of {', '.join(IMPLEMENTATIONS)}, a Kernel, or None"
        )
    if attention != "pallas":
        return attention
    if obstacle := _obstacle(head_width, specs):
        raise ValueError(f"attention='pallas' {obstacle}; use 'xla', or None")
    return Kernel()


def prefix_attention(
    attention: str | Kernel | None,
    cache: AttentionCache,
    lengths_pw: jax.Array,
    size: int,
    dtype,
    specs: Sequence[AttentionSpec] = (),
) -> Callable[[Any], Prefix]:
    """Attention of one query per row to the row's first lengths_pw positions, by layer.

    Args:
      attention: see above.
      cache: rows are the first w slots of each part.
      lengths_pw: at most `size`.
      size: static.
      dtype: of queries.
      specs: see `resolve_attention`.
    """
    attention = resolve_attention(attention, cache.v_lpcksh.shape[-1], specs)
    if attention == "xla":
        return _xla(cache, lengths_pw, size, dtype)
    return _kernel(attention, cache, lengths_pw)


def _obstacle(head_width: int, specs: Sequence[AttentionSpec]) -> str | None:
    """Why the kernel cannot run here."""
    for spec in specs:  # sinks are added outside of it
        if spec != AttentionSpec(head_width**-0.5, sinks=spec.sinks):
            return f"computes no {spec}"
    if platform() != "tpu" or is_old_tpu():
        kind = device_kind() if is_old_tpu() else platform()
        return f"cannot run on {kind}: it needs a TPU from v5e on"
    if not decode_attention.can_tile(head_width):
        return f"cannot run with heads of width {head_width}: it needs a multiple of 16"
    return None


def _xla(cache: AttentionCache, lengths_pw, size: int, dtype) -> Callable[[Any], Prefix]:
    valid_bs = jnp.arange(size) < lengths_pw.reshape(-1, 1)

    def prefix_of(layer):
        k_bkhs, v_bksh = cache.read(layer, lengths_pw.shape[1], size, dtype)
        return Part(k_bkhs, v_bksh, valid_bs)

    return prefix_of


def _kernel(kernel: Kernel, cache: AttentionCache, lengths_pw) -> Callable[[Any], Prefix]:
    if lengths_pw.shape[0] != num_shards("batch"):
        raise ValueError(f"{lengths_pw.shape[0]} parts on {num_shards('batch')} groups of devices")
    *_, heads, width, size = cache.k_lpckhs.shape
    sizes = heads // num_shards("act_kv_heads"), width, size, cache.k_lpckhs.dtype
    steps = jax.vmap(lambda lengths_w: kernel.plan(lengths_w, *sizes))(lengths_pw)

    def local(q_wkgh, cache, layer, lengths_pw, steps):
        (lengths_w,), steps = lengths_pw, jax.tree.map(lambda x: x[0], steps)
        scales = None if cache.k_scale_lpcks is None else (cache.k_scale_lpcks, cache.v_scale_lpcks)
        arrays = cache.k_lpckhs, cache.v_lpcksh, scales
        return decode_attention.attend_cache(kernel, q_wkgh, *arrays, layer, lengths_w, steps)

    if not jax.sharding.get_abstract_mesh().empty:
        heads, part = partition_spec(("batch", "act_kv_heads")), partition_spec(("batch",))
        local = jax.shard_map(
            local,
            in_specs=(heads, partition_specs(cache), partition_spec(()), part, part),
            out_specs=heads,
            check_vma=False,
        )
    return lambda layer: (
        lambda q_bkgh: Attended(*local(q_bkgh, cache, jnp.asarray(layer), lengths_pw, steps))
    )
