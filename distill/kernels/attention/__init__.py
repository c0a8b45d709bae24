"""Causal self-attention in memory linear in the sequence length."""

from distill.kernels.attention.api import attention, most_segments
from distill.kernels.attention.blockwise import RESIDUALS

__all__ = ["RESIDUALS", "attention", "most_segments"]
