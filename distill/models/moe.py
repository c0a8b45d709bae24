"""The mixture of experts: of many small feed-forwards, a router picks a few for every token.

A layer has this in place of `mlp` where its `LayerKind` has `experts`.

The router works in float32. No token is dropped, and none depends on others: a token's experts are
picked from its own scores alone, or were picked by the sampler (`routes`). Tokens are sorted by
expert, and each expert multiplies its own (`kernels.grouped_dot`). On a mesh, devices sort the
tokens of their own rows. A layer's experts are gathered, and stay cut along their width
(`act_ffn`); where the mesh cuts their number (`expert`), tokens go to them (`expert_exchange`).

Shape suffixes, beside those of transformer.py: e experts, c picked experts of a token, m tokens
times picked experts; t counts the tokens of all rows; p the sorted picks of a round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from distill.base.sharding import dividing, mesh_axes, num_shards, partition_spec
from distill.kernels.attention import RESIDUALS
from distill.kernels.grouped_dot import grouped_dot
from distill.models import expert_exchange, mlp, routes
from distill.models.facts import Experts, ModelConfig
from distill.models.primitives import INIT_STD, Layer, ParamMaker

# Weights that every device takes for its own tokens, and their logical axes then.
_USED: dict[str, tuple[str | None, ...]] = {
    "router": (None, None),
    "router_bias": (None,),
    "router_correction": (None,),
    "expert_gate_up_proj": ("expert", None, None, "act_ffn"),
    "expert_down_proj": ("expert", "act_ffn", None),
    "expert_gate_up_bias": ("expert", None, "act_ffn"),
    "expert_down_bias": ("expert", None),
}
# Picks whose experts a device multiplies at once, where it has some experts of several: this many,
# or a quarter more than an even share. Where more picked them, it goes on in further rounds.
SMALLEST_ROUND, ROOM = 4096, 1.25


def parameters(config: ModelConfig, make: ParamMaker) -> dict[str, nnx.Param]:
    """All layers' parameters by name."""
    experts = _experts(config)
    d, e, f = config.model_width, experts.number, experts.width
    params = {
        "router": make.normal(INIT_STD, embed=d, router=e),
        "expert_gate_up_proj": make.normal(INIT_STD, expert=e, gate_up=2, expert_embed=d, ffn=f),
        "expert_down_proj": make.residual(expert=e, ffn=f, expert_embed=d),
    }
    if experts.bias:
        params["router_bias"] = make.filled(0.0, ("router",), e)
        gate_up = "expert", "gate_up", "ffn"
        params["expert_gate_up_bias"] = make.filled(0.0, gate_up, e, 2, f)
        params["expert_down_bias"] = make.filled(0.0, ("expert", None), e, d)
    if experts.correction:
        params["router_correction"] = make.filled(0.0, ("router",), e)
    if width := experts.shared_width:
        params |= mlp.gated_parameters(config, make, "shared_", width)
        if experts.shared_gate:
            params["shared_gate"] = make.normal(INIT_STD, embed=d, router=1)
    return params


class Routing(NamedTuple):
    """Picked experts of each token, and the router's scores of all, float32."""

    picked_btc: jax.Array
    scores_bte: jax.Array


class Load(NamedTuple):
    """Of counted tokens, or of layers of them: how many picked an expert, and its scores' sum.

    And of each token, how many of the experts that the sampler picked were not.
    """

    picks_e: jax.Array
    scores_e: jax.Array
    missed_bt: jax.Array | None = None


def output(
    layer: Layer, x_btd: jax.Array, replayed_btc: jax.Array | None = None
) -> tuple[jax.Array, Routing]:
    """What the mixture adds to the residual stream, and where tokens went.

    The experts `replayed_btc` take the place of the router's own picks, but where they are -1.
    """
    experts = _experts(layer.config)
    weights = {name: layer.weight(name) for name in _USED if layer.has(name)}
    y_btd, routing = _routed(x_btd, weights, layer.config, replayed_btc)
    if experts.shared_width:
        shared_btd = mlp.gated(layer, x_btd, "shared_")
        if experts.shared_gate:
            shared_btd = shared_btd * jax.nn.sigmoid(layer.project("shared_gate", x_btd))
        y_btd = y_btd + shared_btd
    return y_btd, routing


def load(routing: Routing, counted_bt: jax.Array, sampled_btc: jax.Array | None = None) -> Load:
    """Of one layer; `sampled_btc` are the sampler's picks, where they are known."""
    picked_btce = routing.picked_btc[..., None] == jnp.arange(routing.scores_bte.shape[-1])
    counted_btce = picked_btce & counted_bt[..., None, None]
    scores_e = jnp.sum(routing.scores_bte * counted_bt[..., None], axis=(0, 1))
    picks_e = jnp.sum(counted_btce, axis=(0, 1, 2), dtype=jnp.int32)
    missed_bt = None if sampled_btc is None else routes.missed(sampled_btc, routing.picked_btc)
    return Load(picks_e, scores_e, missed_bt)


def add_layers(loads: Mapping[str, Load]) -> Load:
    """The sums over all layers, whose loads are stacked by kind; there is one kind at least."""
    of_kinds = [jax.tree.map(lambda x: jnp.sum(x, axis=0), load) for load in loads.values()]
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *of_kinds)


def balance_loss(scores_e: jax.Array, picks_e: jax.Array, per_token: int) -> jax.Array:
    """The router's own loss, per_token where routing is even: Switch Transformer (2101.03961).

    Equations (4) to (6), as `load_balancing_loss_func` of transformers: number of experts times the
    sum over experts of f_e P_e. f_e are picks, P_e scores, each per token and layer. It is linear
    in scores: those of a part of the tokens, with the picks of all, give the part's share.
    """
    tokens = jnp.sum(picks_e) / per_token  # of all layers
    return len(picks_e) * jnp.sum(picks_e * scores_e) / tokens**2


def _experts(config: ModelConfig) -> Experts:
    assert config.experts is not None  # of a layer with a mixture
    return config.experts


def _routed(
    x_btd: jax.Array,
    weights: dict[str, jax.Array],
    config: ModelConfig,
    replayed_btc: jax.Array | None,
) -> tuple[jax.Array, Routing]:
    """`_mixed`, by the devices of the current mesh; each has its own rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return _mixed(x_btd, weights, config, replayed_btc)
    # What the mesh does not divide is whole on its devices.
    rows, positions = dividing("batch", len(x_btd)), dividing("position", x_btd.shape[1])
    rows_spec = partition_spec((rows, positions, None))
    specs = {name: partition_spec(_USED[name]) for name in weights}

    def of_device(x_btd, weights, replayed_btc):
        y_btd, routing = _mixed(x_btd, weights, config, replayed_btc, exchanges=rows is not None)
        return y_btd[None, None], routing

    # Leading axes of the parts of the experts' width, and of the experts where every device has the
    # same rows: summed here, their gradient is not sent.
    parts = "act_ffn", None if rows else "expert"
    y_ffbtd, routing = jax.shard_map(
        of_device,
        in_specs=(rows_spec, specs, rows_spec),
        out_specs=(partition_spec((*parts, rows, positions, None)), rows_spec),
        check_vma=False,
    )(x_btd, weights, replayed_btc)
    return jnp.sum(y_ffbtd, axis=(0, 1)), routing


def _mixed(
    x_btd: jax.Array,
    weights: dict[str, jax.Array],
    config: ModelConfig,
    replayed_btc: jax.Array | None = None,
    exchanges: bool = False,
) -> tuple[jax.Array, Routing]:
    """Outputs and routing, of a device's rows and its part of the experts' width.

    `exchanges`: whether the experts' devices have different rows, else only the sums are partial.
    """
    x_td = x_btd.reshape(-1, x_btd.shape[-1])
    replayed_tc = None if replayed_btc is None else replayed_btc.reshape(len(x_td), -1)
    scores_tc, picked_tc, scores_te = pick(x_td, weights, _experts(config), replayed_tc)
    weights = {name: w for name, w in weights.items() if name.startswith("expert")}
    axes, number = mesh_axes("expert"), len(weights["expert_down_proj"])
    if not axes:
        y_td = _sum_of_experts(x_td, scores_tc, picked_tc, weights, config)
    elif not exchanges:
        here_tc = picked_tc - jax.lax.axis_index(axes) * number
        y_td = _sum_of_some(config, x_td, scores_tc, here_tc, weights)
    else:
        (axis,) = axes
        sum_here = functools.partial(_sum_of_some, config, weights=weights)
        y_td = expert_exchange.sum_over_devices(
            x_td, scores_tc, picked_tc, sum_here, axis=axis, number=number
        )
    routing = Routing(*(x.reshape(*x_btd.shape[:2], -1) for x in (picked_tc, scores_te)))
    return y_td.reshape(x_btd.shape), routing


def pick(
    x_td: jax.Array, weights: dict[str, Any], experts: Experts, replayed_tc: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of the picked experts, float32, their numbers, and the scores of all.

    That is scores_tc, picked_tc and scores_te. Experts that are replayed are only picked before:
    their weights, and so the router's gradient, come from the scores here.
    """
    router_de = weights["router"].astype(jnp.float32)
    x_td = x_td.astype(jnp.float32)
    logits_te = jnp.matmul(x_td, router_de, precision=jax.lax.Precision.HIGHEST)
    if "router_bias" in weights:
        logits_te = logits_te + weights["router_bias"].astype(jnp.float32)
    scores_te = SCORES[experts.scores](logits_te)
    ranked_te = jax.lax.stop_gradient(scores_te)
    if "router_correction" in weights:
        ranked_te = ranked_te + weights["router_correction"].astype(jnp.float32)
    if replayed_tc is not None:
        ranked_te = routes.keep_replayed(ranked_te, replayed_tc)
    _, picked_tc = jax.lax.top_k(ranked_te, experts.per_token)
    scores_tc = jnp.take_along_axis(scores_te, picked_tc, axis=-1)
    if experts.normalized:
        # Sigmoids can all underflow: with transformers' 1e-20, whose square, which the gradient
        # divides by, would underflow itself without an exact factor on both sides.
        sum_t1 = jnp.sum(scores_tc, axis=-1, keepdims=True) + 1e-20
        scores_tc = scores_tc * 2.0**40 / (sum_t1 * 2.0**40)
    return scores_tc * experts.scale, picked_tc, scores_te


SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
}


def _sum_of_experts(x_td, scores_tc, picked_tc, weights, config: ModelConfig) -> jax.Array:
    """Each token's experts, weighted by their scores; partial sums of a device's part of f."""
    (num_tokens, width), number = x_td.shape, len(weights["expert_down_proj"])
    expert_m = picked_tc.reshape(-1)
    order_m = jnp.argsort(expert_m)
    of_expert_me = expert_m[order_m][:, None] == jnp.arange(number)
    x_md = _permute(jnp.repeat(x_td, picked_tc.shape[1], axis=0), order_m)
    y_md = _permute(_multiply(x_md, of_expert_me, weights, config), jnp.argsort(order_m))
    y_tcd = y_md.reshape(num_tokens, -1, width).astype(jnp.float32)
    return jnp.sum(y_tcd * scores_tc[:, :, None], axis=1).astype(x_td.dtype)


def _multiply(x_md, of_expert_me, weights, config: ModelConfig) -> jax.Array:
    """Of every row its expert's output, in x's dtype; rows are sorted, those of none the last."""
    sizes_e = jnp.sum(of_expert_me, axis=0, dtype=jnp.int32)

    y_mpf = grouped_dot(x_md, weights["expert_gate_up_proj"], sizes_e)  # p: gate, up
    y_mpf = checkpoint_name(y_mpf, RESIDUALS)  # a product that a policy does not know as one
    if "expert_gate_up_bias" in weights:
        bias_epf = weights["expert_gate_up_bias"]
        y_mpf += jnp.einsum("me,epf->mpf", of_expert_me.astype(y_mpf.dtype), bias_epf)
    gated_mf = mlp.gate(config, y_mpf[:, 0], y_mpf[:, 1])
    y_md = grouped_dot(gated_mf, weights["expert_down_proj"], sizes_e)
    if "expert_down_bias" in weights:
        bias_ed = weights["expert_down_bias"] / num_shards("act_ffn")
        y_md += of_expert_me.astype(y_md.dtype) @ bias_ed
    return y_md


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_some(config: ModelConfig, x_td, scores_tc, here_tc, weights) -> jax.Array:
    """`_sum_of_experts` of those picks whose experts this device has; others are no number of one.

    In as many rounds as its picks need. The backward pass multiplies again, round by round.
    """
    picks, y_td = _Picks(config, here_tc, weights), jnp.zeros(x_td.shape, jnp.float32)

    def add(i, y_td):
        row_p, y_pd = picks.multiply(i, x_td, scores_tc, weights)
        return y_td.at[row_p].add(y_pd)

    return jax.lax.fori_loop(0, picks.rounds, add, y_td).astype(x_td.dtype)


def _sum_of_some_forward(config: ModelConfig, *arrays):
    return _sum_of_some(config, *arrays), arrays


def _sum_of_some_backward(config: ModelConfig, arrays, dy_td):
    x_td, scores_tc, here_tc, weights = arrays
    picks = _Picks(config, here_tc, weights)
    x_td, dy_td = x_td.astype(jnp.float32), dy_td.astype(jnp.float32)  # what is added up
    differentiated = x_td, scores_tc, weights

    def add(i, so_far):
        multiply = functools.partial(picks.multiply, i)
        _, pull, row_p = jax.vjp(lambda *x: multiply(*x)[::-1], *differentiated, has_aux=True)
        return jax.tree.map(jnp.add, so_far, pull(dy_td[row_p]))

    nothing = jax.tree.map(jnp.zeros_like, differentiated)
    dx_td, dscores_tc, dweights = jax.lax.fori_loop(0, picks.rounds, add, nothing)
    return dx_td.astype(arrays[0].dtype), dscores_tc, None, dweights


_sum_of_some.defvjp(_sum_of_some_forward, _sum_of_some_backward)


class _Picks:
    """The picks of a device's experts, sorted by expert, in rounds."""

    def __init__(self, config: ModelConfig, here_tc: jax.Array, weights):
        self.config, self.dtype = config, weights["expert_down_proj"].dtype
        self.number, self.per_token = len(weights["expert_down_proj"]), here_tc.shape[1]
        most = len(here_tc) * min(self.per_token, self.number)
        even = here_tc.size * self.number / _experts(config).number
        self.size = min(most, max(SMALLEST_ROUND, math.ceil(ROOM * even)))
        is_here_tc = (here_tc >= 0) & (here_tc < self.number)
        self.expert_m = jnp.where(is_here_tc, here_tc, self.number).reshape(-1)
        self.rounds = -(-jnp.sum(is_here_tc) // self.size)
        self.order_m = jnp.pad(jnp.argsort(self.expert_m), (0, -here_tc.size % self.size))

    def multiply(self, i, x_td, scores_tc, weights) -> tuple[jax.Array, jax.Array]:
        """Of the picks of round i, their tokens, and what is added to these in float32."""
        pick_p = jax.lax.dynamic_slice_in_dim(self.order_m, i * self.size, self.size)
        row_p = pick_p // self.per_token
        # The padding stands behind all picks, whose last are of no expert if the padding is read.
        is_pick_p = i * self.size + jnp.arange(self.size) < self.expert_m.size
        expert_p = jnp.where(is_pick_p, self.expert_m[pick_p], self.number)
        here_p1 = (expert_p < self.number)[:, None]
        x_pd = jnp.where(here_p1, x_td[row_p].astype(self.dtype), 0)
        of_expert_pe = expert_p[:, None] == jnp.arange(self.number)
        y_pd = _multiply(x_pd, of_expert_pe, weights, self.config).astype(jnp.float32)
        return row_p, jnp.where(here_p1, y_pd * scores_tc.reshape(-1)[pick_p][:, None], 0)


def _permute(x_md: jax.Array, order_m: jax.Array) -> jax.Array:
    # Without repetition, the gradient adds nothing up, in whatever order.
    return x_md.at[order_m].get(unique_indices=True, mode="promise_in_bounds")
