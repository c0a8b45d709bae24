"""Causal self-attention in memory linear in the sequence length."""

from distill.kernels.attention.api import MOST_SEGMENTS, attention

__all__ = ["MOST_SEGMENTS", "attention"]
