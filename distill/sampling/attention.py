"""How the decode loop attends to what the cache held when it was entered.

`attention` is `xla` (plain, any platform: reads the first `size` positions of every row), `pallas`
(a kernel for TPUs from v5e: reads every row to its own end), a `Kernel` (with another block size,
or interpreted), or None for the best that each layer can have here. An explicit request that cannot
run is an error. The kernel has no windows: what a window needs is little, and read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill.base.sharding import num_shards, partition_spec
from distill.kernels import decode_attention
from distill.kernels.attention import AttentionSpec
from distill.kernels.decode_attention import Kernel
from distill.kernels.platform import device_kind, is_old_tpu, platform
from distill.models.cache import AttentionCache, ring_positions
from distill.models.decoding import Attended, Part, Prefix
from distill.models.facts import LayerKind
from distill.sampling.cache import Cache, partition_specs

IMPLEMENTATIONS = ("xla", "pallas")


def resolve_attention(
    attention: str | Kernel | None, head_width: int, spec: AttentionSpec
) -> str | Kernel:
    """'xla' or the kernel that a layer runs; ValueError when the one asked for cannot."""
    if attention == "xla":
        return "xla"
    if attention is None:
        return "xla" if _obstacle(head_width, spec) else Kernel()
    if attention != "pallas" and not isinstance(attention, Kernel):
        raise ValueError(
            f"attention={attention!r} is unknown: "
            f"choose one of {', '.join(IMPLEMENTATIONS)}, a Kernel, or None"
        )
    interpreted = isinstance(attention, Kernel) and attention.interpret
    if obstacle := _window(spec) if interpreted else _obstacle(head_width, spec):
        raise ValueError(
            f"attention='pallas' {obstacle}; choose 'xla', or the default, which finds one "
            "that runs"
        )
    return attention if isinstance(attention, Kernel) else Kernel()


def reads_buckets(
    attention: str | Kernel | None, cache: Cache, kinds: Mapping[str, LayerKind]
) -> bool:
    """Whether rows are read up to a common number of positions; else, to the end of each."""
    return any(
        resolve_attention(attention, kind.head_width, kind.attention) == "xla"
        and not cache[name].ring
        for name, kind in kinds.items()
        if kind.attention
    )


def prefix_attention(
    attention: str | Kernel | None,
    cache: Cache,
    lengths_pw: jax.Array,
    size: int,
    dtype,
    kinds: Mapping[str, LayerKind],
) -> Callable[[str, Any], Prefix | None]:
    """Attention of one query per row to the row's first lengths_pw positions.

    Rows are the first w slots of each part; none is longer than `size`, which is static.

    Returns:
      A function of a kind, and of a layer's number among those of that kind; None for a recurrent
      layer, which has no positions.
    """

    def make(layers: AttentionCache, width: int, spec: AttentionSpec) -> Callable[[Any], Prefix]:
        resolved = resolve_attention(attention, width, spec)
        if isinstance(resolved, Kernel):
            return _kernel(resolved, layers, lengths_pw, spec)
        return _xla(layers, lengths_pw, size, dtype)

    made = {
        name: make(cache[name], kind.head_width, kind.attention)
        for name, kind in kinds.items()
        if kind.attention
    }
    return lambda kind, layer: made[kind](layer) if kind in made else None


def _window(spec: AttentionSpec) -> str | None:
    """Why the kernel cannot compute what is asked."""
    return None if spec.window is None else f"cannot attend to a window of {spec.window} tokens"


def _obstacle(head_width: int, spec: AttentionSpec) -> str | None:
    """Why the kernel cannot run here."""
    if platform() != "tpu" or is_old_tpu():
        kind = device_kind() if is_old_tpu() else platform()
        return f"cannot run on {kind}: it needs a TPU from v5e on"
    if not decode_attention.can_tile(head_width):
        return f"cannot run with heads of width {head_width}: it needs a multiple of 16"
    return _window(spec)


def _xla(cache: AttentionCache, lengths_pw, size: int, dtype) -> Callable[[Any], Prefix]:
    size = min(size, cache.size)
    position_bs = ring_positions(lengths_pw.reshape(-1), jnp.arange(size), cache.size)

    def prefix_of(layer):
        k_bkhs, v_bksh = cache.read(layer, lengths_pw.shape[1], size, dtype)
        return Part(k_bkhs, v_bksh, position_bs >= 0, position_bs)

    return prefix_of


def _kernel(
    kernel: Kernel, cache: AttentionCache, lengths_pw, spec: AttentionSpec
) -> Callable[[Any], Prefix]:
    if lengths_pw.shape[0] != num_shards("batch"):
        raise ValueError(f"{lengths_pw.shape[0]} parts on {num_shards('batch')} groups of devices")
    *_, heads, width, size = cache.k_lpckhs.shape
    sizes = heads // num_shards("act_kv_heads"), width, size, cache.k_lpckhs.dtype
    steps = jax.vmap(lambda lengths_w: kernel.plan(lengths_w, *sizes))(lengths_pw)

    def local(q_wkgh, cache, layer, lengths_pw, steps):
        (lengths_w,), steps = lengths_pw, jax.tree.map(lambda x: x[0], steps)
        scales = None if cache.k_scale_lpcks is None else (cache.k_scale_lpcks, cache.v_scale_lpcks)
        arrays = cache.k_lpckhs, cache.v_lpcksh, scales
        return decode_attention.attend_cache(kernel, q_wkgh, *arrays, layer, lengths_w, steps, spec)

    if not jax.sharding.get_abstract_mesh().empty:
        of_heads, of_rows = partition_spec(("batch", "act_kv_heads")), partition_spec(("batch",))
        local = jax.shard_map(
            local,
            in_specs=(of_heads, partition_specs(cache), partition_spec(()), of_rows, of_rows),
            out_specs=of_heads,
            check_vma=False,
        )
    return lambda layer: (
        lambda q_bkgh: Attended(*local(q_bkgh, cache, jnp.asarray(layer), lengths_pw, steps))
    )
