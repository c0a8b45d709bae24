"""Causal self-attention in memory linear in the sequence length."""

from distill.kernels.attention.api import MOST_SEGMENTS, attention
from distill.kernels.attention.blockwise import RESIDUALS

__all__ = ["MOST_SEGMENTS", "RESIDUALS", "attention"]
