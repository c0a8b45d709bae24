"""Causal self-attention in memory linear in the sequence length."""

from distill.kernels.attention.api import MOST_SEGMENTS, attention
from distill.kernels.attention.blockwise import RESIDUALS
from distill.kernels.attention.spec import AttentionSpec

__all__ = ["MOST_SEGMENTS", "RESIDUALS", "AttentionSpec", "attention"]
