"""Which experts a mixture's tokens were sent to, of all layers: from the sampler to the trainer.

The sampler's and the trainer's products are rounded differently, and so a router may pick other
experts for the same token. The sampler records its picks, and the trainer counts those that it does
not pick too. Or it replays them: "Stabilizing MoE Reinforcement Learning by Aligning Training and
Inference Routers" (2510.11370) takes the sampler's picks, and its own scores of them as weights.

A token's picks are one vector, m: one layer's after the other's, -1 where nothing is known. In
sequences they are the column `routed_experts`, of the token that was predicted with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.models.facts import ModelConfig

DTYPE = jnp.int16


def width(config: ModelConfig) -> int:
    """Picks of a token, in all layers; 0 without a mixture."""
    if config.experts is None:
        return 0
    return config.experts.per_token * sum(map(len, numbers(config).values()))


def numbers(config: ModelConfig) -> dict[str, np.ndarray]:
    """Of each kind of layer with a mixture, its layers' places among all that have one."""
    mixed = [kind for kind in config.layers if config.kinds[kind].experts]
    return {kind: np.flatnonzero(np.array(mixed) == kind) for kind in dict.fromkeys(mixed)}


def merged(config: ModelConfig, picked: Mapping[str, Any]) -> jax.Array | None:
    """picked_xm, from the stacked picked_lxc of each kind of layer; None without a mixture."""
    of_kinds = numbers(config)
    if not of_kinds:
        return None
    order_l = np.argsort(np.concatenate(list(of_kinds.values())))
    stacked_lxc = jnp.concatenate([picked[kind].astype(DTYPE) for kind in of_kinds])
    if len(of_kinds) > 1:
        stacked_lxc = stacked_lxc[order_l]
    picked_xlc = jnp.moveaxis(stacked_lxc, 0, -2)
    return picked_xlc.reshape(*picked_xlc.shape[:-2], -1)


def of_layer(
    config: ModelConfig, sampled_btm: jax.Array | None, number: jax.Array | None
) -> jax.Array | None:
    """sampled_btc of the layer with this number, if it has a mixture and anything is known."""
    if sampled_btm is None or number is None or config.experts is None:
        return None
    size = config.experts.per_token
    return jax.lax.dynamic_slice_in_dim(sampled_btm, number * size, size, axis=-1)


def keep_replayed(ranked_te: jax.Array, replayed_tc: jax.Array) -> jax.Array:
    """Scores by which no other experts are picked; all of them where none is replayed.

    They stay in the order of their scores: where the router picks the same ones, nothing changes.
    """
    is_replayed_tce = replayed_tc[..., None] == jnp.arange(ranked_te.shape[-1])
    stays_te = jnp.any(is_replayed_tce, axis=-2) | (replayed_tc[..., :1] < 0)
    return jnp.where(stays_te, ranked_te, -jnp.inf)


def missed(sampled_btc: jax.Array, picked_btc: jax.Array) -> jax.Array:
    """Of each token, how many of the sampler's experts are not picked; 0 where none is known."""
    differs_btcc = sampled_btc[..., :, None] != picked_btc[..., None, :]
    return jnp.sum(jnp.all(differs_btcc, axis=-1) & (sampled_btc >= 0), axis=-1, dtype=jnp.int32)


def disagreement(
    sampled_btm: jax.Array, missed_bt: jax.Array | None, counted_bt: jax.Array
) -> dict[str, jax.Array]:
    """Sums over counted tokens: those of which the picks are known, and their share missed."""
    assert missed_bt is not None  # since picks are given
    known_bt = counted_bt & (sampled_btm[..., 0] >= 0)
    share_bt = missed_bt / sampled_btm.shape[-1]
    return {
        "routed_tokens": jnp.sum(known_bt, dtype=jnp.float32),
        "routes_missed": jnp.sum(jnp.where(known_bt, share_bt, 0.0)),
    }
