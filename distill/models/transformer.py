"""The one decoder: families differ only by facts in ModelConfig.

Shape suffixes, used in the whole project:
  b batch          t query position   s key position     d model width    n query heads
  k kv heads       h head width       f ffn width        v vocabulary     l layers
  e experts        c picked experts of a token

Layers may be of several kinds (`facts.LayerKind`), each with parameters of its own. The layers of a
kind live in one `Block`, whose parameters have a leading 'layers' axis. A model of one kind has it
at `layers`; a model of several has each at `layers/KIND`. What goes with layers, as the cache,
is stacked in the same way. The forward pass scans over stretches of layers whose kinds repeat a
period (`scan.py`), so compile time does not grow with depth.

Parameters keep `param_dtype` (float32 masters) and are cast to `dtype` where they are used; norms,
rotary embeddings and softmax run in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from distill.base.sharding import constrain, in_device_memory
from distill.kernels.attention import RESIDUALS
from distill.kernels.attention import attention as attention_kernel
from distill.kernels.linear_divergence import Head
from distill.models import attention, lora, mlp, moe, recurrent, routes
from distill.models.attention import Rotation, make_rotations
from distill.models.facts import ModelConfig
from distill.models.gathering import gathered
from distill.models.primitives import INIT_STD, ParamMaker, normal, project, rms_norm
from distill.models.scan import scan_layers

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
}


class Block(nnx.Module):
    """All decoder layers of a kind: attention or recurrence, and feed-forward, with their norms.

    Constructed with stacked parameters; the methods are called on a copy that holds one layer's.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config, self.kind = config, config.kinds[kind]
        self.dtype = dtype
        make = ParamMaker(config.layers.count(kind), config.num_layers, param_dtype, rngs)
        if self.kind.recurrent:
            params = recurrent.parameters(config, self.kind.recurrent, make)
        else:
            params = attention.parameters(config, self.kind, make)
        feed_forward = moe if self.kind.experts else mlp
        params |= feed_forward.parameters(config, make)
        for name in _norm_names(config):
            params[name] = make.filled(1.0 - config.norm_offset, (None,), config.model_width)
        for name, param in params.items():
            setattr(self, name, param)

    def __call__(
        self,
        x_btd: jax.Array,
        rotation: Rotation | None,
        segment_ids_bt: jax.Array | None = None,
        lengths_b: jax.Array | None = None,
        replayed_btc: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], moe.Routing | None]:
        """One layer over whole rows: the stream after it, what it remembers, a mixture's routing.

        It remembers k_btkh and v_btkh, or a state after lengths_b tokens: `recurrent.Remembered`.
        A mixture takes the experts `replayed_btc`, if there are any.
        """
        y_btd = self.mixer_input(x_btd)
        if self.kind.attention is None:
            mixed_btd, remembered = recurrent.output(self, y_btd, segment_ids_bt, lengths_b)
            x_btd, routing = self.finish(x_btd, mixed_btd, replayed_btc)
            return x_btd, remembered, routing
        q_btnh, k_btkh, v_btkh, gate_btnh = attention.query_key_value(self, y_btd, rotation)
        attended_btnh = attention_kernel(
            q_btnh, k_btkh, v_btkh, self.kind.attention, segment_ids_bt, self.sinks_n()
        )
        mixed_btd = attention.output(self, attended_btnh, gate_btnh)
        x_btd, routing = self.finish(x_btd, mixed_btd, replayed_btc)
        return x_btd, (k_btkh, v_btkh), routing

    def mixer_input(self, x_btd: jax.Array) -> jax.Array:
        """What attention or recurrence reads of the residual stream."""
        return x_btd if self.config.norms == "after" else self.normalize("attention_norm", x_btd)

    def sinks_n(self) -> jax.Array | None:
        """Scores of the attention's sinks, where it has some."""
        return self.weight("sinks") if self.config.sinks else None

    def finish(
        self, x_btd: jax.Array, mixed_btd: jax.Array, replayed_btc: jax.Array | None = None
    ) -> tuple[jax.Array, moe.Routing | None]:
        """Adds what attention or recurrence gives, and then the feed-forward, to the stream."""
        x_btd = self._add(x_btd, mixed_btd, "attention_out_norm")
        y_btd = x_btd if self.config.norms == "after" else self.normalize("ffn_norm", x_btd)
        routing = None
        if self.kind.experts:
            added_btd, routing = moe.output(self, y_btd, replayed_btc)
        else:
            added_btd = mlp.gated(self, y_btd)
        return self._add(x_btd, added_btd, "ffn_out_norm"), routing

    def _add(self, x_btd: jax.Array, added_btd: jax.Array, norm: str) -> jax.Array:
        if self.config.norms != "before":
            added_btd = self.normalize(norm, added_btd)
        return constrain_residual(x_btd + _scaled(added_btd, self.config.residual_scale))

    def project(self, name: str, x: jax.Array) -> jax.Array:
        return project(x, self.weight(name))

    def has(self, name: str) -> bool:
        return hasattr(self, name)

    def weight(self, name: str) -> jax.Array:
        return lora.weight(in_device_memory(getattr(self, name).get_value()), self.dtype)

    def exact(self, name: str) -> jax.Array:
        return getattr(self, name)[...].astype(jnp.float32)

    def normalize(self, name: str, x: jax.Array) -> jax.Array:
        scale = getattr(self, name)[...]
        return rms_norm(x, scale, self.config.rms_eps, self.config.norm_offset)


def _norm_names(config: ModelConfig) -> list[str]:
    before, after = ["attention_norm", "ffn_norm"], ["attention_out_norm", "ffn_out_norm"]
    return {"before": before, "after": after, "both": before + after}[config.norms]


class Transformer(nnx.Module):
    """Decoder-only language model.

    Args:
      dtype: what activations and the cache are computed in.
      remat: what the backward pass recomputes: 'none', 'full' (each layer from its input) or
        'dots' (all but the matrix products and, without cuDNN, attention).
      replays: whether tokens go to the experts that the sampler picked, where these are given.

    Raises:
      ValueError: unknown `remat`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        remat: str = "none",
        replays: bool = False,
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat, self.replays = remat, replays
        d, v = config.model_width, config.vocab_size
        self.embedding = normal(rngs, (v, d), INIT_STD, param_dtype, ("vocab", "embed"))
        blocks = {kind: Block(config, kind, self.dtype, param_dtype, rngs) for kind in config.kinds}
        self.layers = nnx.Dict(blocks) if len(blocks) > 1 else blocks[config.layers[0]]
        self.final_norm = nnx.Param(
            jnp.full(d, 1.0 - config.norm_offset, param_dtype), logical_axes=(None,)
        )
        if not config.tied:
            self.output_head = normal(rngs, (d, v), INIT_STD, param_dtype, ("embed", "vocab"))

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        segment_ids_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, hidden_btd in `dtype`.

        Args:
          positions_bt: rotary positions; default 0, 1, 2, ... in every row.
          segment_ids_bt: a token attends to tokens of its own segment at its own index or before.
            Default: every row is one segment; padding behind its end then changes nothing before.
        """
        return self.with_load(tokens_bt, positions_bt, segment_ids_bt)[0]

    def with_load(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array | None = None,
        segment_ids_bt: jax.Array | None = None,
        counted_bt: jax.Array | None = None,
        sampled_btm: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, moe.Load]]:
        """Hidden states as above, and by kind of layer with experts `moe.load` of the counted.

        `sampled_btm` are the experts that the sampler picked, as `routes` has them: compared, or
        replayed.
        """
        batch, length = tokens_bt.shape
        if positions_bt is None:
            positions_bt = jnp.broadcast_to(jnp.arange(length), (batch, length))
        rotations = make_rotations(self.config, positions_bt)
        graphs, stacks = self.split_layers()

        def layer(kind, x_btd, scanned):
            def run(x_btd, scanned):
                state, number = scanned
                block = nnx.merge(graphs[kind], gathered(state, self.dtype, self.remat != "none"))
                sampled_btc = routes.of_layer(self.config, sampled_btm, number)
                replayed_btc = sampled_btc if self.replays else None
                rows = rotations[kind], segment_ids_bt, None, replayed_btc
                x_btd, _, routing = block(x_btd, *rows)
                if routing is None or counted_bt is None:
                    return x_btd, None
                return x_btd, moe.load(routing, counted_bt, sampled_btc)

            if self.remat != "none":
                # Inside scan nothing can be merged across iterations, so no barrier is needed.
                run = jax.checkpoint(run, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            return run(x_btd, scanned)

        numbers = {} if sampled_btm is None else routes.numbers(self.config)
        scanned = {kind: (state, numbers.get(kind)) for kind, state in stacks.items()}
        x_btd, loads = scan_layers(layer, self.embed(tokens_bt), scanned, self.config.layers)
        return self.normalize(x_btd), {k: load for k, load in loads.items() if load is not None}

    def split_layers(self) -> tuple[dict[str, nnx.GraphDef], dict[str, nnx.State]]:
        """The graph of a layer of each kind, and the stacked parameters of the kind's layers."""
        stacks = self.layers
        of_one = {kind: stacks for kind in self.config.kinds}
        blocks = dict(stacks.items()) if isinstance(stacks, nnx.Dict) else of_one
        halves = {kind: nnx.split(blocks[kind]) for kind in self.config.kinds}
        graphs = {kind: graph for kind, (graph, _) in halves.items()}
        return graphs, {kind: state for kind, (_, state) in halves.items()}

    def head(self) -> Head:
        """The output head in `dtype`; the transposed embedding when tied."""
        w_dv = self.embedding[...].T if self.config.tied else self.output_head[...]
        return Head(w_dv.astype(self.dtype), self.config.logit_soft_cap)

    def logits(self, hidden_btd: jax.Array, head: Head | None = None) -> jax.Array:
        """Scores of the next token, logits_btv in float32; the head is `head()` if not given."""
        logits_btv = (head or self.head()).logits(hidden_btd)
        return constrain(logits_btv, "batch", "position", "act_vocab")

    def embed(self, tokens_bt: jax.Array) -> jax.Array:
        """The residual stream before the first layer, x_btd in `dtype`."""
        # Tokens are sharded by what may also shard the table's width, so gather the width first.
        table_vd = constrain(self.embedding[...], "vocab", None)
        tokens_bt = constrain(tokens_bt, "batch", "position")
        # Cast after the lookup: its gradient adds up many tokens, which bfloat16 would lose.
        x_btd = jnp.take(table_vd, tokens_bt, axis=0).astype(self.dtype)
        return constrain_residual(_scaled(x_btd, self.config.embedding_scale))

    def normalize(self, x_btd: jax.Array) -> jax.Array:
        """Hidden states from the residual stream after the last layer."""
        config = self.config
        hidden_btd = rms_norm(x_btd, self.final_norm[...], config.rms_eps, config.norm_offset)
        return _scaled(hidden_btd, config.logit_scale)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """x times a scale that is rounded to its dtype, as the families' own code does it."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def constrain_residual(x_btd: jax.Array) -> jax.Array:
    return constrain(x_btd, "batch", "position", "act_embed")
