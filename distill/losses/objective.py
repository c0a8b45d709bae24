"""Which tokens carry loss, how they are averaged, and which loss they carry.

The only place that masks and averages. The objective is a sum of token losses divided by the number
of valid tokens over all hosts and microbatches (`token_weights`): neither it nor its gradient
depends on how the batch was cut.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill.base.errors import UserError
from distill.base.sharding import constrain
from distill.kernels.linear_divergence import (
    TokenValues,
    check_pointwise,
    linear_cross_entropy,
    linear_divergence,
    linear_divergence_top_k,
    linear_loss,
    resolve_implementation,
    weighted_first,
)
from distill.losses.divergences import (
    DistillationLossFn,
    PointwiseDivergence,
    get_divergence,
    get_loss,
    is_pointwise,
)

# Folded into the seed first, so that the coins share no random numbers with the sampler.
_COIN_STREAM = 0x636F696E


def token_weights(mask_bt: jax.Array, num_valid_tokens: jax.Array | int) -> jax.Array:
    """mask / number of valid tokens over all hosts and microbatches, float32 (b, t)."""
    return mask_bt.astype(jnp.float32) / jnp.maximum(num_valid_tokens, 1)


def importance_weights(
    log_probs_bt: jax.Array, sampler_log_probs_bt: jax.Array, sampled_bt: jax.Array, clip: float
) -> jax.Array:
    """min(clip, q_now(token) / q_sampler(token)) for sampled tokens, 1 for others; no gradient.

    Weighs what stale weights sampled as if today's had, token by token. Truncated importance
    sampling: Ionides, "Truncated Importance Sampling", J. Comput. Graph. Stat. 17 (2008); as the
    truncated rho of IMPALA (Espeholt et al., arXiv:1802.01561); between a sampler and a trainer of
    language models: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training" (2025, fengyao.notion.site/off-policy-rl).

    Args:
      log_probs_bt, sampler_log_probs_bt: of the response tokens, of the same (untruncated)
        distribution with the trainer's and the sampler's weights.
      sampled_bt: whether a token counts and the student sampled it.
      clip: largest weight, above 0.
    """
    ratios_bt = jnp.exp(jax.lax.stop_gradient(log_probs_bt - sampler_log_probs_bt))
    return jnp.where(sampled_bt, jnp.minimum(ratios_bt, clip), 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKScores:
    """A teacher known by its likeliest tokens (k: one of them) at every position of a response.

    In a microbatch, at every position of a row.

    Attributes:
      ids_brk: int32, distinct at a position; -1 where fewer are known.
      log_probs_brk: float32, at temperature 1.
    """

    ids_brk: jax.Array
    log_probs_brk: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective as a hashable function; build it with `make_objective`."""

    divergence: PointwiseDivergence | None
    loss_fn: DistillationLossFn | None
    temperature: float
    scale: float
    implementation: str | None
    chunk: int | None

    @property
    def needs_teacher(self) -> bool:
        return self.divergence is not None or self.loss_fn is not None

    def __call__(
        self,
        hidden_s_btd: jax.Array,
        head_s: jax.Array,
        hidden_t_btd: jax.Array | None,
        head_t: jax.Array | None,
        targets_bt: jax.Array,
        weights_bt: jax.Array,
        *,
        vocab_size: int,
        scores: TopKScores | None = None,
    ) -> tuple[jax.Array, TokenValues]:
        """Weighted sum of the token losses, differentiable by the student's hidden states and head.

        Args:
          hidden_s_btd, hidden_t_btd: final hidden states; the teacher's and
            its head are not read (None) for hard labels.
          head_s, head_t: output heads (d, v) in the compute dtype.
          targets_bt: the tokens that positions predict; anything where their weight is 0.
          weights_bt: from `token_weights`.
          vocab_size: ids that student and teacher share; further head columns are padding.
          scores: what is known of the teacher instead of its hidden states and head (None then).

        Returns:
          float32 scalar, and TokenValues of shape (b, t) that carry no gradient.
        """
        options = dict(vocab_size=vocab_size, implementation=self.implementation, chunk=self.chunk)
        order = weighted_first(weights_bt.reshape(-1))

        def flatten(values_btx):
            return order.apply(_flatten_tokens(values_btx))

        targets_t, weights_t = flatten(targets_bt), flatten(self.scale * weights_bt)
        hidden_s_td = flatten(hidden_s_btd)
        if not self.needs_teacher:
            loss, values = linear_cross_entropy(
                hidden_s_td, head_s, targets_t, weights_t, **options
            )
        elif scores is not None:
            loss, values = linear_divergence_top_k(
                hidden_s_td,
                head_s,
                flatten(scores.ids_brk),
                flatten(scores.log_probs_brk),
                weights_t,
                divergence=self.divergence,
                temperature=self.temperature,
                targets=targets_t,
                **options,
            )
        else:
            rows = (hidden_s_td, head_s, flatten(hidden_t_btd), head_t, weights_t)
            options |= dict(targets=targets_t, temperature=self.temperature)
            if self.divergence is not None:
                loss, values = linear_divergence(*rows, divergence=self.divergence, **options)
            else:
                loss, values = linear_loss(*rows, loss_fn=self.loss_fn, **options)
        values = order.undo(values)
        return loss, jax.tree.map(lambda value_t: value_t.reshape(targets_bt.shape), values)

    def log_probs(
        self,
        hidden_btd: jax.Array,
        head: jax.Array,
        targets_bt: jax.Array,
        weights_bt: jax.Array,
        *,
        vocab_size: int,
    ) -> jax.Array:
        """log q(target) at temperature 1, float32 (b, t): a forward pass of the head, no gradient.

        0 where there is no weight.
        Weights must be known before the loss, since that makes its gradients with its values.
        """
        order = weighted_first(weights_bt.reshape(-1))
        arrays = map(_flatten_tokens, (hidden_btd, targets_bt, weights_bt))
        hidden_td, targets_t, weights_t = order.apply(jax.lax.stop_gradient(tuple(arrays)))
        _, values = linear_cross_entropy(
            hidden_td,
            jax.lax.stop_gradient(head),
            targets_t,
            weights_t,
            vocab_size=vocab_size,
            implementation=self.implementation,
            chunk=self.chunk,
        )
        return order.undo(values.log_prob_s).reshape(targets_bt.shape)


def make_objective(
    kl_type: str,
    *,
    mixed_kl_weight: float = 0.5,
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    hard_labels: bool = False,
    top_k_teacher: bool = False,
    implementation: str | None = None,
    chunk: int | None = None,
) -> Objective:
    """The objective of a configuration.

    Args:
      kl_type: a divergence or a loss of losses/divergences.py, built in or registered.
      mixed_kl_weight, jsd_beta, skew_alpha: see `get_divergence`.
      temperature: divides both models' logits before the divergence.
      temperature_squared: multiplies the loss by temperature^2, which keeps the size of the
        gradient (Hinton et al., arXiv:1503.02531).
      hard_labels: cross-entropy with the response tokens instead; no teacher, temperature 1.
      top_k_teacher: the teacher will be TopKScores, which take a divergence, no other loss.
      implementation, chunk: see kernels/linear_divergence/api.py.

    Raises:
      UserError: unknown kl_type, a parameter out of range, or an implementation that cannot run.
    """
    if not temperature > 0:
        raise UserError(f"kl_temperature={temperature} is not positive")
    pointwise = is_pointwise(kl_type)
    if top_k_teacher and not pointwise:
        raise UserError(
            f"kl_type={kl_type} is a loss of whole rows, but of a teacher behind a server only the "
            "likeliest tokens are known: choose a divergence, or teacher.backend=local"
        )
    fused = hard_labels or (pointwise and not top_k_teacher)
    try:
        resolve_implementation(implementation, fused=fused)
    except ValueError as error:
        raise UserError(f"loss_implementation: {error}") from None
    parameters = dict(mixed_kl_weight=mixed_kl_weight, jsd_beta=jsd_beta, skew_alpha=skew_alpha)
    divergence = get_divergence(kl_type, **parameters) if pointwise and not hard_labels else None
    if divergence is not None:
        try:
            check_pointwise(divergence)
        except ValueError as error:
            raise UserError(f"kl_type={kl_type}: {error}") from None
    return Objective(
        divergence=divergence,
        loss_fn=get_loss(kl_type) if not pointwise and not hard_labels else None,
        temperature=float(temperature),
        scale=float(temperature) ** 2 if temperature_squared and not hard_labels else 1.0,
        implementation=implementation,
        chunk=chunk,
    )


def lambda_coin(seed: int, step: int, lambda_: float) -> bool:
    """Whether this step trains on student-generated responses, with probability lambda_.

    A function of (seed, step) alone: the same on every host and after a resume.
    """
    if lambda_ in (0, 1):
        return bool(lambda_)  # a toss would make the host wait for the device's queue every step
    return bool(jax.random.uniform(_coin_key(seed, step)) < lambda_)


def sample_coins(seed: int, step: int, prompt_index_b: jax.Array, lambda_: float) -> jax.Array:
    """One coin per prompt, bool (b,): a function of (seed, step, prompt index) alone."""
    keys_b = jax.vmap(jax.random.fold_in, (None, 0))(_coin_key(seed, step), prompt_index_b)
    return jax.vmap(jax.random.uniform)(keys_b) < lambda_


def _coin_key(seed: int, step: int) -> jax.Array:
    # threefry by name: a flag may change the default generator, a resumed run must not notice.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, _COIN_STREAM), step)


def _flatten_tokens(values_btx: jax.Array) -> jax.Array:
    return constrain(
        values_btx.reshape(-1, *values_btx.shape[2:]), "token", *[None] * (values_btx.ndim - 2)
    )
