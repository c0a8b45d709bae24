"""Losses from hidden states and output heads, without ever holding all logits.

Shapes: hidden (T, D) and head (D, V) in the compute dtype, student and teacher each with its own D
and V. A head is an array, or a `Head`, which may cap its logits: before the temperature, in values
and gradients alike. `vocab_size` is the shared vocabulary, at most either V (further columns are
padding: finite, and ignored); weights (T,), where a token of weight 0 has no influence at all, and
values of 0 (what stands behind the last one with weight is not computed: see compaction.py);
targets int (T,), those outside of the vocabulary being no target. Gradients reach hidden_s and
head_s only; the values per token carry none. Products accumulate in float32; their operands are
rounded as JAX's default precision says.

`implementation`: `reference` (all logits, automatic differentiation), `chunked` (plain XLA, any
platform), `pallas` (kernels for TPUs from v5e and GPUs from Hopper on), a `Sweeps` (kernels with
other block sizes, or interpreted), or None for the best that runs here. `chunk` is the number of
tokens, over all devices, whose logits exist at once; None fits a memory budget, and `reference` has
no use for it. All functions raise ValueError for shapes that do not agree and for an implementation
that cannot run here.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from distill.kernels.linear_divergence import loop, reference
from distill.kernels.linear_divergence.head import Head
from distill.kernels.linear_divergence.shared import SharedHead, SharedIds
from distill.kernels.linear_divergence.sweeps import Sweeps, XlaSweeps
from distill.kernels.linear_divergence.token_losses import (
    DivergenceTerm,
    RowLoss,
    TermSum,
    TokenValues,
    check_pointwise,
)
from distill.kernels.linear_divergence.topk import TopK
from distill.kernels.platform import cuda_capability, device_kind, is_old_tpu, platform

IMPLEMENTATIONS = ("reference", "chunked", "pallas")


def linear_loss(
    loss: TermSum | RowLoss,
    hidden_s: jax.Array,
    head_s: jax.Array | Head,
    teacher: jax.Array | TopK | None,
    head_t: jax.Array | Head | None,
    weights: jax.Array,
    *,
    targets: jax.Array | None = None,
    columns: Mapping[str, jax.Array] | None = None,
    shared: SharedIds | None = None,
    vocab_size: int,
    implementation: str | Sweeps | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, TokenValues]:
    """The sum over tokens of weights * loss, and the values per token.

    Args:
      loss: a sum of terms; or a loss of whole rows, which sees a chunk of tokens at a time.
      teacher: its hidden states; or, with `head_t` None, a TopK at the loss's temperature, or
        nothing, for terms that do not look at it. Of a TopK, divergences see k tokens and one
        bucket; `log_prob_t` of a target that is not among the k is the log-mass of the bucket.
      columns: (T, ...) by name, for the loss's weights.
      shared: where the teacher has other ids: divergences see the shared ones and one bucket, in
        which `log_prob_t` of a target is that is not shared. `vocab_size` is then the student's.
    """
    if not loss.temperature > 0:
        raise ValueError(f"temperature={loss.temperature} is not positive")
    if not isinstance(loss, RowLoss):
        for term in loss.terms:
            check_pointwise(term.function)
    by_outcomes = isinstance(teacher, TopK) or shared is not None
    if isinstance(loss, RowLoss) and shared is not None:
        raise ValueError("a loss of whole rows compares id by id: it takes no teacher of other ids")
    fused = not isinstance(loss, RowLoss) and not by_outcomes
    implementation = resolve_implementation(implementation, fused=fused)
    head_s, head_t = _head(head_s), None if head_t is None else _head(head_t)
    sizes = vocab_size, vocab_size if shared is None else shared.size_t
    tokens = _tokens(hidden_s, head_s, teacher, head_t, targets, weights, columns or {}, sizes)
    if implementation == "reference":
        return reference.linear_token_loss(loss, tokens, head_s, head_t, vocab_size, shared)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} tokens: it must be at least 1")
    weights_t: jax.Array | SharedHead | None = None
    cap_t = None
    if head_t is not None:
        weights_t = head_t.weights_dv if shared is None else shared.head(head_t)
        cap_t = head_t.soft_cap
    options = loop.Options(_sweeps(implementation), vocab_size, chunk, head_s.soft_cap, cap_t)
    return loop.linear_token_loss(loss, options, tokens, head_s.weights_dv, weights_t)


def _head(head: jax.Array | Head) -> Head:
    return head if isinstance(head, Head) else Head(head)


def linear_divergence(
    hidden_s: jax.Array,
    head_s: jax.Array | Head,
    hidden_t: jax.Array,
    head_t: jax.Array | Head,
    weights: jax.Array,
    *,
    divergence,
    temperature: float = 1.0,
    **options,
) -> tuple[jax.Array, TokenValues]:
    """sum_t weights_t * D_t, D_t = sum_v divergence(log p, log q), and the values per token.

    `divergence` is a hashable pointwise function of (log_p, log_q); `temperature` divides the
    logits of both models; for the rest see `linear_loss`. ValueError also for a divergence that is
    not pointwise.
    """
    loss = TermSum.of(DivergenceTerm(divergence), temperature=temperature)
    return linear_loss(loss, hidden_s, head_s, hidden_t, head_t, weights, **options)


def per_token_divergences(
    hidden_s: jax.Array,
    head_s: jax.Array | Head,
    hidden_t: jax.Array,
    head_t: jax.Array | Head,
    *,
    divergences: tuple,
    temperature: float = 1.0,
    weights: jax.Array | None = None,
    **options,
) -> jax.Array:
    """Several divergences of the same logits, float32 (len(divergences), T); for evaluation.

    Not multiplied by `weights`, but 0 where those are.
    """
    if not divergences:
        raise ValueError("divergences=(): give at least one")
    loss = TermSum.of(*map(DivergenceTerm, divergences), temperature=temperature)
    weights = jnp.ones(hidden_s.shape[0]) if weights is None else weights
    arrays = jax.lax.stop_gradient((hidden_s, head_s, hidden_t, head_t, weights))
    return jnp.stack(linear_loss(loss, *arrays, **options)[1].terms)


def resolve_implementation(
    implementation: str | Sweeps | None, *, fused: bool = True
) -> str | Sweeps:
    """The implementation that will run; ValueError when the one asked for cannot.

    `fused` says whether the loss is pointwise and its teacher has logits, as the kernels need.
    """
    if implementation is None:
        return "pallas" if fused and _pallas_is_default() else "chunked"
    if not isinstance(implementation, str):
        return implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "pallas":
        _check_pallas_runs(fused)
    return implementation


def _check_pallas_runs(fused: bool) -> None:
    if not fused:
        reason = (
            "runs neither losses of whole rows nor a top-k teacher or one with another tokenizer"
        )
    elif platform() not in ("tpu", "gpu"):
        reason = f"cannot run on {platform()}: it needs a TPU from v5e, or a GPU from Hopper on"
    elif _is_too_old():
        reason = f"cannot run on {device_kind()}: it needs a TPU from v5e, or a GPU from Hopper on"
    else:
        return
    raise ValueError(
        f"implementation='pallas' {reason}; choose 'chunked', or the default, which "
        "finds one that runs"
    )


def _pallas_is_default() -> bool:
    """On TPUs that can run it, and of GPUs on those where a whole run has used it."""
    if platform() == "gpu":
        return jax.__version_info__ >= (0, 11) and 9 <= cuda_capability() < 10
    return platform() == "tpu" and not _is_too_old()


def _is_too_old() -> bool:
    if platform() == "tpu":
        return is_old_tpu()
    described = jax.default_backend() != "gpu"  # the GPU that is compiled for
    return not described and cuda_capability() < 9


def _within(ids, vocab_size: int) -> jax.Array:
    """int32 ids, -1 for those outside of the vocabulary."""
    return jnp.where((0 <= ids) & (ids < vocab_size), ids, -1).astype(jnp.int32)


def _sweeps(implementation: str | Sweeps) -> Sweeps:
    if not isinstance(implementation, str):
        return implementation
    if implementation == "chunked":
        return XlaSweeps.for_cpu() if platform() == "cpu" else XlaSweeps()
    # Imported here: Pallas is slow to import, and its GPU part is missing from some builds.
    if platform() == "tpu":
        from distill.kernels.linear_divergence import pallas_tpu

        return pallas_tpu.Sweeps()
    from distill.kernels.linear_divergence import pallas_gpu

    return pallas_gpu.Sweeps()


def _tokens(
    hidden_s, head_s, teacher, head_t, targets, weights, columns, sizes: tuple[int, int]
) -> loop.Tokens:
    """The arguments bundled, once they agree; -1 stands for no target."""
    vocab_size, size_t = sizes
    _check_model("_s", hidden_s, head_s.weights_dv, vocab_size)
    num_tokens = hidden_s.shape[0]
    if not num_tokens:
        raise ValueError(f"hidden_s {hidden_s.shape} has no tokens")
    if head_t is not None:
        _check_model("_t", teacher, head_t.weights_dv, size_t)
        if teacher.shape[0] != num_tokens:
            raise ValueError(f"hidden_t {teacher.shape} is not of {num_tokens} tokens")
    if isinstance(teacher, TopK):
        ids, log_probs = teacher.ids_tk, teacher.log_probs_tk
        if ids.ndim != 2 or ids.shape != log_probs.shape:
            raise ValueError(
                f"the teacher's ids {ids.shape} and log-probabilities "
                f"{log_probs.shape} must both be (T, k)"
            )
        if len(ids) != num_tokens:
            raise ValueError(f"the teacher's ids {ids.shape} are not of {num_tokens} tokens")
        teacher = TopK(_within(ids, vocab_size), log_probs.astype(jnp.float32))
    targets = jnp.full(num_tokens, -1, jnp.int32) if targets is None else targets
    for name, array in dict(targets=targets, weights=weights).items():
        if array.shape != (num_tokens,):
            raise ValueError(f"{name} {array.shape} must be ({num_tokens},), one for each token")
    targets, weights = _within(targets, vocab_size), weights.astype(jnp.float32)
    return loop.Tokens(hidden_s, teacher, targets, weights, dict(columns))


def _check_model(suffix: str, hidden, head, vocab_size: int) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(
            f"hidden{suffix} {hidden.shape} and head{suffix} {head.shape} must be (T, D) and (D, V)"
        )
    if head.shape[1] < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} exceeds the {head.shape[1]} columns of head{suffix}"
        )
