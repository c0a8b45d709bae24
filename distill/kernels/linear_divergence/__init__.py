"""Losses fused with the output heads of student and teacher; see api.py."""

from distill.kernels.linear_divergence.api import (
    linear_divergence,
    linear_loss,
    per_token_divergences,
    resolve_implementation,
)
from distill.kernels.linear_divergence.compaction import weighted_first
from distill.kernels.linear_divergence.head import Head
from distill.kernels.linear_divergence.shared import SharedIds
from distill.kernels.linear_divergence.token_losses import (
    DivergenceTerm,
    RowLoss,
    Term,
    TermSum,
    TokenStatistics,
    TokenValues,
    check_pointwise,
    cross_entropy,
    reads_teacher,
    weights_of,
)
from distill.kernels.linear_divergence.topk import TopK

__all__ = [
    "DivergenceTerm",
    "Head",
    "RowLoss",
    "SharedIds",
    "Term",
    "TermSum",
    "TokenStatistics",
    "TokenValues",
    "TopK",
    "check_pointwise",
    "cross_entropy",
    "linear_divergence",
    "linear_loss",
    "per_token_divergences",
    "reads_teacher",
    "resolve_implementation",
    "weighted_first",
    "weights_of",
]
