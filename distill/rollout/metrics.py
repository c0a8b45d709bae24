"""What any rollout tells, whichever backend made it."""

from __future__ import annotations

import numpy as np

from distill.sampling.request import Rollout


def describe_rollout(rollout: Rollout, seconds: float) -> dict[str, float]:
    """Speed, lengths (tokens, EOS counted), the share cut at the limit, repetition and entropy."""
    tokens, lengths_b = rollout.num_sampled, rollout.lengths_b
    mask_br = np.arange(rollout.log_probs_br.shape[1]) < lengths_b[:, None]
    log_prob = np.where(mask_br, rollout.log_probs_br, 0.0).sum(dtype=np.float64)
    return {
        "generation/seconds": seconds,
        "generation/tokens_per_second": float(tokens / seconds),
        "generation/mean_length": float(lengths_b.mean()),
        "generation/max_length": float(lengths_b.max()),
        "generation/truncated": float(1.0 - rollout.stopped_b.mean()),
        "generation/repetition": repetition(rollout.tokens_br, lengths_b),
        # E[-log q] over samples of q; what temperature and truncation sample differs from q.
        "generation/entropy_estimate": float(-log_prob / tokens),
    }


def repetition(tokens_br: np.ndarray, lengths_b: np.ndarray, n: int = 4) -> float:
    """Share of the n-grams of all responses that came earlier in the same response."""
    windows = tokens_br.shape[1] - n + 1
    if windows < 1:
        return 0.0
    hashes = np.zeros((len(tokens_br), windows), np.uint64)
    for i in range(n):
        tokens = tokens_br[:, i : i + windows].astype(np.uint64)
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens + np.uint64(1)
    counts_b = np.maximum(lengths_b - n + 1, 0)
    # n-grams that reach beyond the end get the largest number and are sorted behind the others.
    valid = np.arange(windows) < counts_b[:, None]
    hashes = np.sort(np.where(valid, hashes >> np.uint64(1), np.uint64(2**64 - 1)), axis=1)
    repeats = (hashes[:, 1:] == hashes[:, :-1]) & valid[:, 1:]
    return float(repeats.sum() / max(counts_b.sum(), 1))
