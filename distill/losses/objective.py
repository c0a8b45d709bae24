"""Which tokens carry loss, how they are averaged, and which loss they carry.

The only place that masks and averages. The objective is a sum of token losses divided by the number
of valid tokens over all hosts and microbatches (`token_weights`): neither it nor its gradient
depends on how the batch was cut.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.kernels.linear_divergence import (
    TokenValues,
    check_pointwise,
    linear_cross_entropy,
    linear_divergence,
    linear_divergence_top_k,
    linear_loss,
    resolve_implementation,
)
from distill.losses.divergences import (
    DistillationLossFn,
    PointwiseDivergence,
    get_divergence,
    get_loss,
    is_pointwise,
)
from distill.sharding import constrain

# Folded into the seed first, so that the coins share no random numbers with the sampler.
_COIN_STREAM = 0x636F696E


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseWindow:
    """The response positions of a batch, compacted to r columns; r counts response tokens.

    Column j of row i is the prediction of response token j: it is made at sequence position
    `index_br[i, j]`, should be `targets_br[i, j]`, and counts where `mask_br[i, j]`.
    """

    index_br: jax.Array
    targets_br: jax.Array
    mask_br: jax.Array


def response_window(
    tokens_bt: jax.Array, prompt_lengths_b: jax.Array, lengths_b: jax.Array, size: int
) -> ResponseWindow:
    """The first `size` response tokens of every row, EOS included, prompt and padding excluded.

    Rows are prompt, response, padding, with lengths_b = prompt + response. Validity comes from the
    lengths and never from token ids, because pad may equal EOS. Responses longer than `size` lose
    their end: choose a size that holds them. Without a prompt nothing predicts the first response
    token, which then does not count.
    """
    num_positions = tokens_bt.shape[1]
    index_br = prompt_lengths_b[:, None] - 1 + jnp.arange(size)
    # The state at a position predicts the next token: the target's position must be valid.
    mask_br = (index_br >= 0) & (index_br + 1 < jnp.minimum(lengths_b, num_positions)[:, None])
    index_br = jnp.clip(index_br, 0, num_positions - 1)
    targets_br = gather_positions(tokens_bt, jnp.minimum(index_br + 1, num_positions - 1))
    return ResponseWindow(index_br=index_br, targets_br=targets_br, mask_br=mask_br)


def gather_positions(values_bt: jax.Array, index_br: jax.Array) -> jax.Array:
    """values (b, t, ...) at the positions of index_br, (b, r, ...)."""
    index = index_br.reshape(index_br.shape + (1,) * (values_bt.ndim - 2))
    return jnp.take_along_axis(values_bt, index, axis=1)


def token_weights(mask_br: jax.Array, num_valid_tokens: jax.Array | int) -> jax.Array:
    """mask / number of valid tokens over all hosts and microbatches, float32 (b, r)."""
    return mask_br.astype(jnp.float32) / jnp.maximum(num_valid_tokens, 1)


def importance_weights(
    log_probs_br: jax.Array, sampler_log_probs_br: jax.Array, sampled_br: jax.Array, clip: float
) -> jax.Array:
    """min(clip, q_now(token) / q_sampler(token)) for sampled tokens, 1 for others; no gradient.

    Weighs what stale weights sampled as if today's had, token by token. Truncated importance
    sampling: Ionides, "Truncated Importance Sampling", J. Comput. Graph. Stat. 17 (2008); as the
    truncated rho of IMPALA (Espeholt et al., arXiv:1802.01561); between a sampler and a trainer of
    language models: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training" (2025, fengyao.notion.site/off-policy-rl).

    Args:
      log_probs_br, sampler_log_probs_br: of the response tokens, of the same (untruncated)
        distribution with the trainer's and the sampler's weights.
      sampled_br: whether a token counts and the student sampled it.
      clip: largest weight, above 0.
    """
    ratios_br = jnp.exp(jax.lax.stop_gradient(log_probs_br - sampler_log_probs_br))
    return jnp.where(sampled_br, jnp.minimum(ratios_br, clip), 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKScores:
    """A teacher known by its likeliest tokens at every response position (k: one of them).

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
        hidden_s_brd: jax.Array,
        head_s: jax.Array,
        hidden_t_brd: jax.Array | None,
        head_t: jax.Array | None,
        targets_br: jax.Array,
        weights_br: jax.Array,
        *,
        vocab_size: int,
        scores: TopKScores | None = None,
    ) -> tuple[jax.Array, TokenValues]:
        """Weighted sum of the token losses, differentiable by the student's hidden states and head.

        Args:
          hidden_s_brd, hidden_t_brd: final hidden states at the response window; the teacher's and
            its head are not read (None) for hard labels.
          head_s, head_t: output heads (d, v) in the compute dtype.
          targets_br: response tokens.
          weights_br: from `token_weights`.
          vocab_size: ids that student and teacher share; further head columns are padding.
          scores: what is known of the teacher instead of its hidden states and head (None then).

        Returns:
          float32 scalar, and TokenValues of shape (b, r) that carry no gradient.
        """
        options = dict(vocab_size=vocab_size, implementation=self.implementation, chunk=self.chunk)
        targets_t, weights_t = targets_br.reshape(-1), self.scale * weights_br.reshape(-1)
        hidden_s_td = _flatten_tokens(hidden_s_brd)
        if not self.needs_teacher:
            loss, values = linear_cross_entropy(
                hidden_s_td, head_s, targets_t, weights_t, **options
            )
        elif scores is not None:
            loss, values = linear_divergence_top_k(
                hidden_s_td,
                head_s,
                _flatten_tokens(scores.ids_brk),
                _flatten_tokens(scores.log_probs_brk),
                weights_t,
                divergence=self.divergence,
                temperature=self.temperature,
                targets=targets_t,
                **options,
            )
        else:
            rows = (hidden_s_td, head_s, _flatten_tokens(hidden_t_brd), head_t, weights_t)
            options |= dict(targets=targets_t, temperature=self.temperature)
            if self.divergence is not None:
                loss, values = linear_divergence(*rows, divergence=self.divergence, **options)
            else:
                loss, values = linear_loss(*rows, loss_fn=self.loss_fn, **options)
        return loss, jax.tree.map(lambda value_t: value_t.reshape(targets_br.shape), values)

    def log_probs(
        self, hidden_brd: jax.Array, head: jax.Array, targets_br: jax.Array, *, vocab_size: int
    ) -> jax.Array:
        """log q(target) at temperature 1, float32 (b, r): a forward pass of the head, no gradient.

        Weights must be known before the loss, since that makes its gradients with its values.
        """
        hidden_td, head = jax.lax.stop_gradient((_flatten_tokens(hidden_brd), head))
        targets_t = targets_br.reshape(-1)
        _, values = linear_cross_entropy(
            hidden_td,
            head,
            targets_t,
            jnp.ones(targets_t.shape),
            vocab_size=vocab_size,
            implementation=self.implementation,
            chunk=self.chunk,
        )
        return values.log_prob_s.reshape(targets_br.shape)


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


def _flatten_tokens(values_brx: jax.Array) -> jax.Array:
    return constrain(values_brx.reshape(-1, values_brx.shape[-1]), "token", None)
