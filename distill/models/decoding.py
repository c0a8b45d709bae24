"""The decoder as a sampler runs it: prompts at once, then one token per row and turn.

Keys and values are in two parts. The prefix is what a row had seen when the decode loop was
entered, and is only read in it. The tail takes the tokens of the loop: turn t of every row lies at
position t, so a turn writes one slice in place, whatever the rows' lengths. Keys are stored with
their positions last (h, s): products of few queries with many keys then need no transposed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill.models.transformer import Block, Rotation, Transformer, attend, make_rotation
from distill.sharding import constrain

# Up to this depth the decode loop's layers are unrolled: their weights are then copied out of the
# stack once per loop and not once per turn (XLA for CPUs multiplies no slice without copying it).
# Beyond, they are scanned over: the time to compile does not grow.
UNROLLED_LAYERS = 12

KeysAndValues = tuple[jax.Array, jax.Array]
# Reads a layer's prefix, (k_bkhs, v_bksh); the layer may be traced.
ReadPrefix = Callable[[Any], KeysAndValues]
# One turn through all layers: (x_b1d, rotation, lengths, turn, tail) -> (x_b1d, tail).
Walk = Callable[[jax.Array, Rotation, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def prefill(model: Transformer, tokens_gp: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states of right-padded prompts, and their keys and values.

    Returns:
      hidden_gpd, k_lgkhp, v_lgkph; what stands behind a prompt's end means nothing.
    """
    batch, length = tokens_gp.shape
    rotation = make_rotation(model.config, jnp.broadcast_to(jnp.arange(length), (batch, length)))
    mask_1ts = jnp.tril(jnp.ones((1, length, length), bool))
    graphdef, stacked = nnx.split(model.layers)

    def layer(x_gpd, layer_state):
        block = nnx.merge(graphdef, layer_state)
        q_gpnh, k_gpkh, v_gpkh = block.query_key_value(x_gpd, rotation)
        x_gpd = block.finish(x_gpd, attend(q_gpnh, k_gpkh, v_gpkh, mask_1ts))
        return x_gpd, (k_gpkh.transpose(0, 2, 3, 1), v_gpkh.transpose(0, 2, 1, 3))

    x_gpd, (k_lgkhp, v_lgkph) = jax.lax.scan(layer, model.embed(tokens_gp), stacked)
    return model.normalize(x_gpd), k_lgkhp, v_lgkph


def empty_tail(model: Transformer, batch: int, size: int) -> list[KeysAndValues] | KeysAndValues:
    """Room for the keys and values of `size` turns; of one kind with what `make_walk` walks."""
    config = model.config

    def zeros(*layers: int) -> KeysAndValues:
        heads = *layers, batch, config.num_kv_heads
        return (
            jnp.zeros((*heads, config.head_width, size), model.dtype),
            jnp.zeros((*heads, size, config.head_width), model.dtype),
        )

    unrolled = config.num_layers <= UNROLLED_LAYERS
    return [zeros() for _ in range(config.num_layers)] if unrolled else zeros(config.num_layers)


def stack_tail(tail: list[KeysAndValues] | KeysAndValues) -> KeysAndValues:
    """k_lbkht, v_lbkth of a tail of either kind."""
    return jax.tree.map(lambda *x: jnp.stack(x), *tail) if isinstance(tail, list) else tail


def make_walk(model: Transformer, read_prefix: ReadPrefix) -> Walk:
    """The layers of a decode loop; call it outside of the loop, for what is read once only."""
    graphdef, stacked = nnx.split(model.layers)
    num_layers = model.config.num_layers

    def at(layer: Any) -> Block:
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], stacked))

    if num_layers <= UNROLLED_LAYERS:
        layers = [(at(layer), read_prefix(layer)) for layer in range(num_layers)]
        return lambda x_b1d, *step: _walk_unrolled(layers, x_b1d, *step)

    def walk(x_b1d, rotation, lengths_b, turn, tail):
        def layer(x_b1d, scanned):
            index, layer_state, layer_tail = scanned
            block, prefix = nnx.merge(graphdef, layer_state), read_prefix(index)
            return _decode_layer(block, prefix, x_b1d, rotation, lengths_b, turn, layer_tail)

        return jax.lax.scan(layer, x_b1d, (jnp.arange(num_layers), stacked, tail))

    return walk


def decode_turn(
    model: Transformer, walk: Walk, token_b: jax.Array, lengths_b: jax.Array, turn, tail
) -> tuple[jax.Array, Any]:
    """hidden_bd of each row's newest token, and the tail with its keys and values.

    Args:
      model: whose layers `walk` walks.
      walk: from `make_walk`.
      token_b: the newest tokens; they stand at positions lengths_b + turn.
      lengths_b: tokens of each row's prefix.
      turn: number of the turn, from 0.
      tail: keys and values of the turns before.
    """
    rotation = make_rotation(model.config, (lengths_b + turn)[:, None])
    x_b1d, tail = walk(model.embed(token_b[:, None]), rotation, lengths_b, turn, tail)
    return model.normalize(x_b1d)[:, 0], tail


def _walk_unrolled(layers: Iterable, x_b1d, rotation, lengths_b, turn, tail):
    new_tail = []
    for (block, prefix), layer_tail in zip(layers, tail, strict=True):
        x_b1d, layer_tail = _decode_layer(
            block, prefix, x_b1d, rotation, lengths_b, turn, layer_tail
        )
        new_tail.append(layer_tail)
    return x_b1d, new_tail


def _decode_layer(block: Block, prefix: KeysAndValues, x_b1d, rotation, lengths_b, turn, tail):
    q_b1nh, k_b1kh, v_b1kh = block.query_key_value(x_b1d, rotation)
    tail_k_bkht, tail_v_bkth = tail
    tail_k_bkht = jax.lax.dynamic_update_slice_in_dim(
        tail_k_bkht, k_b1kh.transpose(0, 2, 3, 1), turn, axis=3
    )
    tail_v_bkth = jax.lax.dynamic_update_slice_in_dim(
        tail_v_bkth, v_b1kh.transpose(0, 2, 1, 3), turn, axis=2
    )
    tail = tail_k_bkht, tail_v_bkth
    return block.finish(x_b1d, _attend_in_parts(q_b1nh, prefix, tail, lengths_b, turn)), tail


def _attend_in_parts(q_b1nh, prefix: KeysAndValues, tail: KeysAndValues, lengths_b, turn):
    """Attention of one query per row over both parts at once, softmax in float32."""
    batch, _, num_heads, head_width = q_b1nh.shape
    num_kv_heads, size = prefix[0].shape[1], prefix[0].shape[3]
    # Each key-value head serves a group (g) of query heads.
    q_bkgh = q_b1nh.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_width)

    def scores(k_bkhs, valid_bs):
        scores_bkgs = jnp.einsum(
            "bkgh,bkhs->bkgs", q_bkgh, k_bkhs, preferred_element_type=jnp.float32
        )
        return jnp.where(valid_bs[:, None, None], scores_bkgs * head_width**-0.5, -jnp.inf)

    tail_size = tail[0].shape[3]
    in_prefix_bs = jnp.arange(size) < lengths_b[:, None]
    in_tail_bt = jnp.broadcast_to(jnp.arange(tail_size) <= turn, (batch, tail_size))
    scores_bkgs = jnp.concatenate(
        [scores(prefix[0], in_prefix_bs), scores(tail[0], in_tail_bt)], axis=-1
    )
    probs_bkgs = jax.nn.softmax(scores_bkgs, axis=-1).astype(q_b1nh.dtype)
    attended_bkgh = sum(
        jnp.einsum("bkgs,bksh->bkgh", probs, values)
        for probs, values in (
            (probs_bkgs[..., :size], prefix[1]),
            (probs_bkgs[..., size:], tail[1]),
        )
    )
    attended_b1nh = attended_bkgh.reshape(batch, 1, num_heads, head_width)
    return constrain(attended_b1nh, "batch", "position", "act_heads", None)
