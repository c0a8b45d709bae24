"""Losses fused with the output heads of student and teacher; see api.py."""

from distill.kernels.linear_divergence.api import (
    linear_cross_entropy,
    linear_divergence,
    linear_divergence_top_k,
    linear_loss,
    per_token_divergences,
    resolve_implementation,
)
from distill.kernels.linear_divergence.compaction import weighted_first
from distill.kernels.linear_divergence.token_losses import TokenValues, check_pointwise

__all__ = [
    "TokenValues",
    "check_pointwise",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_divergence_top_k",
    "linear_loss",
    "per_token_divergences",
    "resolve_implementation",
    "weighted_first",
]
