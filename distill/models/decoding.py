"""The decoder as a sampler runs it: prompts at once, then one token per row and step.

Keys and values are in two parts. The prefix is what a row had seen when the decode loop was
entered, and is only read in it. The tail takes the tokens of the loop: step t of every row lies at
position t, so a step writes one slice in place, whatever the rows' lengths. Keys are stored with
their positions last (h, s): products of few queries with many keys then need no transposed copy.
Of a recurrent layer the tail is its state, which every step replaces.
How the prefix is attended to is the caller's: in plain arrays, together with the tail, or by a
kernel of its own, whose result is merged with the tail's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill.base.sharding import constrain, in_device_memory
from distill.kernels.attention import AttentionSpec
from distill.kernels.attention.blockwise import cap_scores
from distill.kernels.linear_divergence import Head
from distill.models import attention, moe, recurrent, routes
from distill.models.attention import Rotation, make_rotations
from distill.models.cache import LayerCache, Tail
from distill.models.facts import ModelConfig
from distill.models.scan import scan_layers
from distill.models.transformer import Block, Transformer

# Up to this depth the decode loop's layers are unrolled, with `LoopWeights` made before: XLA for
# CPUs multiplies no slice without copying it, and a scan of 4 layers took a fifth longer to sample.
# Beyond, they are scanned over: the time to compile does not grow.
UNROLLED_LAYERS = 12


class LoopWeights(NamedTuple):
    """Weights of a shallow model as its decode loop reads them; nothing of a deep one.

    Every layer's by themselves, and a tied output head: few rows are multiplied faster with a table
    that lies as if it were none.
    """

    layers: tuple[nnx.State, ...] = ()
    head: Head | None = None


class Attended(NamedTuple):
    """Attention to some of a row's positions, in float32.

    Each key-value head serves a group (g) of query heads. The log of the sum of exponentiated
    scores is what it takes to merge two of them.
    """

    values_bkgh: jax.Array
    log_sum_bkg: jax.Array


class Part(NamedTuple):
    """Some of a row's positions, of which the valid ones are attended to."""

    k_bkhs: jax.Array
    v_bksh: jax.Array
    valid_bs: jax.Array
    position_bs: jax.Array | None = None  # of a prefix


# A layer's prefix: in plain arrays, or as attention of q_bkgh to it.
Prefix = Part | Callable[[jax.Array], Attended]
# Of every layer of a shallow model, or stacked by kind.
Tails = list[Tail] | dict[str, Tail]
# One step through all layers: (x_b1d, step, tail) -> (x_b1d, tail, picked_b1m), see `routes`.
Walk = Callable[[jax.Array, "Step", Any], tuple[jax.Array, Any, jax.Array | None]]


class Step(NamedTuple):
    """What all layers know of a decode step.

    Attributes:
      number: of the step, from 0.
      lengths_b: tokens of each row's prefix.
      rotations: of the newest tokens, for each kind of layer.
      remembers_b: rows whose recurrent layers take the token up; None: all.
    """

    number: jax.Array
    lengths_b: jax.Array
    rotations: dict[str, Rotation | None]
    remembers_b: jax.Array | None = None


def prefill(
    model: Transformer, tokens_gp: jax.Array, lengths_g: jax.Array
) -> tuple[jax.Array, dict[str, Tail], jax.Array | None]:
    """Hidden states of right-padded prompts, and what each kind of layer keeps of them, stacked.

    Returns:
      hidden_gpd, what `new_cache` takes, and the picked experts, picked_gpm (`routes`); what stands
      behind a prompt's end means nothing.
    """
    batch, length = tokens_gp.shape
    positions_gp = jnp.broadcast_to(jnp.arange(length), (batch, length))
    rotations = make_rotations(model.config, positions_gp)
    graphs, stacks = model.split_layers()

    def layer(kind, x_gpd, state):
        block = nnx.merge(graphs[kind], state)
        x_gpd, kept, routing = block(x_gpd, rotations[kind], lengths_b=lengths_g)
        if block.kind.attention:
            k_gpkh, v_gpkh = kept
            kept = k_gpkh.transpose(0, 2, 3, 1), v_gpkh.transpose(0, 2, 1, 3)
        return x_gpd, (kept, _picked(routing))

    x_gpd, made = scan_layers(layer, model.embed(tokens_gp), stacks, model.config.layers)
    kept, picked = ({kind: pair[i] for kind, pair in made.items()} for i in range(2))
    return model.normalize(x_gpd), kept, routes.merged(model.config, picked)


def first_tails(model: Transformer, cache: dict[str, LayerCache], width: int, size: int) -> Tails:
    """What layers remember before a loop of `size` steps; of one form with what `make_walk` walks.

    Args:
      model: has the layers.
      cache: of each kind of layer; rows are the first `width` slots of each part.
      width, size: static.
    """
    stacked = {kind: layers.tail(width, size, model.dtype) for kind, layers in cache.items()}
    if model.config.num_layers > UNROLLED_LAYERS:
        return stacked
    return _unstacked(model.config, stacked)


def stack_tails(config: ModelConfig, tails: Tails) -> dict[str, Tail]:
    """Tails of either form, stacked by kind."""
    if isinstance(tails, dict):
        return tails
    return _stacked(config, tails)


def _unstacked(config: ModelConfig, stacks: dict[str, Any]) -> list[Any]:
    """Every layer's part, in order, of what is stacked by kind."""
    return [jax.tree.map(lambda x: x[i], stacks[kind]) for kind, i in config.places]  # noqa: B023


def _stacked(config: ModelConfig, parts: list[Any]) -> dict[str, Any]:
    """Every layer's part, stacked by kind."""
    by_kind: dict[str, list[Any]] = {kind: [] for kind in config.kinds}
    for kind, part in zip(config.layers, parts, strict=True):
        by_kind[kind].append(part)
    return {kind: jax.tree.map(lambda *x: jnp.stack(x), *own) for kind, own in by_kind.items()}


def make_loop_weights(model: Transformer) -> LoopWeights:
    """For all calls of a decode loop, as long as the weights are the same."""
    if model.config.num_layers > UNROLLED_LAYERS:
        return LoopWeights()
    _, stacks = model.split_layers()
    layers = tuple(_unstacked(model.config, stacks))
    return LoopWeights(in_device_memory(layers), model.head() if model.config.tied else None)


def abstract_loop_weights(model: Transformer) -> LoopWeights:
    """Shapes and layouts of `make_loop_weights`, of a model that holds shapes on a mesh."""
    if model.config.num_layers > UNROLLED_LAYERS:
        return LoopWeights()

    table_vd = model.embedding.get_value()

    def placed(shape: tuple[int, ...], dtype, spec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(table_vd.sharding.mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def first(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return placed(x.shape[1:], x.dtype, x.sharding.spec[1:])

    _, stacks = model.split_layers()
    layers = tuple(jax.tree.map(first, stacks[kind]) for kind in model.config.layers)
    head_dv = placed(table_vd.shape[::-1], model.dtype, table_vd.sharding.spec[::-1])
    head = Head(head_dv, model.config.logit_soft_cap)  # type: ignore[arg-type]  # a shape
    return LoopWeights(layers, head if model.config.tied else None)


def make_walk(
    model: Transformer, weights: LoopWeights, prefix_of: Callable[[str, Any], Prefix | None]
) -> Walk:
    """The layers of a decode loop; call it outside of the loop, for what is read once only.

    Args:
      model: has the layers.
      weights: from `make_loop_weights`.
      prefix_of: of a layer's kind, and of its number among those of that kind, which may be traced.
    """
    graphs, stacks = model.split_layers()
    config = model.config
    if config.num_layers <= UNROLLED_LAYERS:
        layers = [
            (kind, nnx.merge(graphs[kind], state), prefix_of(kind, number))
            for (kind, number), state in zip(config.places, weights.layers, strict=True)
        ]

        def walk_unrolled(x_b1d, step, tail):
            new_tail, picked = [], []
            for (kind, block, prefix), layer_tail in zip(layers, tail, strict=True):
                rotation = step.rotations[kind]
                x_b1d, layer_tail, picked_b1c = _decode_layer(
                    block, rotation, prefix, x_b1d, step, layer_tail
                )
                new_tail.append(layer_tail)
                picked.append(picked_b1c)
            return x_b1d, new_tail, routes.merged(config, _stacked(config, picked))

        return walk_unrolled

    numbers = {kind: jnp.arange(config.layers.count(kind)) for kind in stacks}

    def walk(x_b1d, step, tails):
        # Carried, not scanned over: then all layers' are updated in place, and none is copied.
        def layer(kind, carry, scanned):
            (x_b1d, tails), (number, state) = carry, scanned
            block, prefix = nnx.merge(graphs[kind], state), prefix_of(kind, number)
            tail = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, False), tails[kind]
            )
            rotation = step.rotations[kind]
            x_b1d, tail, picked = _decode_layer(block, rotation, prefix, x_b1d, step, tail)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
            return (x_b1d, tails | {kind: jax.tree.map(put, tails[kind], tail)}), picked

        scanned = {kind: (numbers[kind], stacks[kind]) for kind in stacks}
        carry, picked = scan_layers(layer, (x_b1d, tails), scanned, config.layers)
        return *carry, routes.merged(config, picked)

    return walk


def decode_step(
    model: Transformer,
    walk: Walk,
    rotations: dict[str, Rotation | None],
    token_b: jax.Array,
    lengths_b: jax.Array,
    number,
    tail,
    remembers_b: jax.Array | None = None,
) -> tuple[jax.Array, Any, jax.Array | None]:
    """hidden_bd of each row's newest token, the tail with its keys and values, and its picked_bm.

    Args:
      model: whose layers `walk` walks.
      rotations: from `make_rotations`, of the positions of all steps of the loop.
      token_b: the newest tokens; they stand at positions lengths_b + number.
      lengths_b: tokens of each row's prefix.
      number: of the step, from 0.
      tail: of all layers, after the steps before.
      remembers_b: see `Step`.
    """
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=number, slice_size=1, axis=1)
    step = Step(number, lengths_b, jax.tree.map(cut, rotations), remembers_b)
    x_b1d, tail, picked_b1m = walk(model.embed(token_b[:, None]), step, tail)
    picked_bm = None if picked_b1m is None else picked_b1m[:, 0]
    return model.normalize(x_b1d)[:, 0], tail, picked_bm


def attend_part(q_bkgh: jax.Array, part: Part, spec: AttentionSpec) -> Attended:
    """Attention to one part; to zeros, of sum 0, where nothing in it is valid."""
    scores_bkgs = _scores(q_bkgh, part, spec)
    # Finite even where nothing is valid; elsewhere, the sum is at least 1.
    highest_bkg = jnp.maximum(jnp.max(scores_bkgs, axis=-1), jnp.finfo(jnp.float32).min)
    weights_bkgs = jnp.exp(scores_bkgs - highest_bkg[..., None])
    sum_bkg = jnp.sum(weights_bkgs, axis=-1)
    values_bkgh = _weighted_sum(weights_bkgs, part) / jnp.maximum(sum_bkg, 1.0)[..., None]
    return Attended(values_bkgh, highest_bkg + jnp.log(sum_bkg))


def _attend_together(
    q_bkgh: jax.Array, one: Part, other: Part, spec: AttentionSpec, sinks_n: jax.Array | None
) -> jax.Array:
    """values_bkgh of both parts under one softmax, in float32."""
    scores = [_scores(q_bkgh, one, spec), _scores(q_bkgh, other, spec)]
    if sinks_n is not None:
        scores.append(
            jnp.broadcast_to(_sinks_kg(q_bkgh, sinks_n)[..., None], (*q_bkgh.shape[:3], 1))
        )
    probs_bkgs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    first, both = one.valid_bs.shape[1], one.valid_bs.shape[1] + other.valid_bs.shape[1]
    return _weighted_sum(probs_bkgs[..., :first], one) + _weighted_sum(
        probs_bkgs[..., first:both], other
    )


def _sinks_kg(q_bkgh: jax.Array, sinks_n: jax.Array) -> jax.Array:
    return sinks_n.astype(jnp.float32).reshape(q_bkgh.shape[1:3])


def _merge(one: Attended, other: Attended, sinks_n: jax.Array | None) -> jax.Array:
    """values_bkgh of the positions of both, of which at least one has any."""
    log_sum_bkg = jnp.logaddexp(one.log_sum_bkg, other.log_sum_bkg)
    if sinks_n is not None:
        log_sum_bkg = jnp.logaddexp(log_sum_bkg, _sinks_kg(one.values_bkgh, sinks_n))
    mine, others = (
        part.values_bkgh * jnp.exp(part.log_sum_bkg - log_sum_bkg)[..., None]
        for part in (one, other)
    )
    return mine + others


def _scores(q_bkgh: jax.Array, part: Part, spec: AttentionSpec) -> jax.Array:
    scores_bkgs = jnp.einsum(
        "bkgh,bkhs->bkgs", q_bkgh, part.k_bkhs, preferred_element_type=jnp.float32
    )
    scores_bkgs = cap_scores(scores_bkgs * spec.scale, spec.soft_cap)
    return jnp.where(part.valid_bs[:, None, None], scores_bkgs, -jnp.inf)


def _weighted_sum(weights_bkgs: jax.Array, part: Part) -> jax.Array:
    return jnp.einsum(
        "bkgs,bksh->bkgh",
        weights_bkgs.astype(part.v_bksh.dtype),
        part.v_bksh,
        preferred_element_type=jnp.float32,
    )


def _decode_layer(
    block: Block,
    rotation: Rotation | None,
    prefix: Prefix | None,
    x_b1d: jax.Array,
    step: Step,
    tail: Tail,
) -> tuple[jax.Array, Tail, jax.Array | None]:
    """One layer of a decode step, and the experts it picks; a recurrent one has no prefix."""
    y_b1d = block.mixer_input(x_b1d)
    if prefix is None:
        mixed_b1d, new = recurrent.step(block, y_b1d, tail)
        tail = new if step.remembers_b is None else _select(step.remembers_b, new, tail)
    else:
        mixed_b1d, tail = _attend(block, rotation, prefix, y_b1d, step, tail)
    x_b1d, routing = block.finish(x_b1d, mixed_b1d)
    return x_b1d, tail, _picked(routing)


def _picked(routing: moe.Routing | None) -> jax.Array | None:
    return None if routing is None else routing.picked_btc


def _select(chosen_b: jax.Array, new: Tail, old: Tail) -> Tail:
    def select(new_b: jax.Array, old_b: jax.Array) -> jax.Array:
        return jnp.where(chosen_b.reshape(-1, *[1] * (new_b.ndim - 1)), new_b, old_b)

    return jax.tree.map(select, new, old)


def _attend(
    block: Block,
    rotation: Rotation | None,
    prefix: Prefix,
    y_b1d: jax.Array,
    step: Step,
    tail: Tail,
) -> tuple[jax.Array, Tail]:
    spec = block.kind.attention
    assert spec is not None  # a recurrent layer has no prefix
    q_b1nh, k_b1kh, v_b1kh, gate_b1nh = attention.query_key_value(block, y_b1d, rotation)
    tail_k_bkht, tail_v_bkth = tail
    tail_k_bkht = jax.lax.dynamic_update_slice_in_dim(
        tail_k_bkht, k_b1kh.transpose(0, 2, 3, 1), step.number, axis=3
    )
    tail_v_bkth = jax.lax.dynamic_update_slice_in_dim(
        tail_v_bkth, v_b1kh.transpose(0, 2, 1, 3), step.number, axis=2
    )
    tail = tail_k_bkht, tail_v_bkth
    batch, num_kv_heads, width, size = tail_k_bkht.shape
    q_bkgh = q_b1nh.reshape(batch, num_kv_heads, -1, width)
    valid_t = jnp.arange(size) <= step.number
    if spec.window is not None:
        valid_t &= jnp.arange(size) > step.number - spec.window
    tail_part = Part(*tail, jnp.broadcast_to(valid_t, (batch, size)))
    if isinstance(prefix, Part):
        prefix = _in_window(prefix, step, spec)
        attended_bkgh = _attend_together(q_bkgh, prefix, tail_part, spec, block.sinks_n())
    else:
        attended = prefix(q_bkgh), attend_part(q_bkgh, tail_part, spec)
        attended_bkgh = _merge(*attended, block.sinks_n())
    attended_b1nh = attended_bkgh.astype(q_b1nh.dtype).reshape(q_b1nh.shape)
    attended_b1nh = constrain(attended_b1nh, "batch", "position", "act_heads", None)
    return attention.output(block, attended_b1nh, gate_b1nh), tail


def _in_window(prefix: Part, step: Step, spec: AttentionSpec) -> Part:
    """The prefix, of which what the window has left behind is not valid."""
    if spec.window is None:
        return prefix
    assert prefix.position_bs is not None, "only a tail has no positions"
    first_b = step.lengths_b + step.number - spec.window + 1
    seen_bs = prefix.position_bs >= first_b[:, None]
    return prefix._replace(valid_bs=prefix.valid_bs & seen_bs)
