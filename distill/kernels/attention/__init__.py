"""Causal self-attention in memory linear in the sequence length."""

from distill.kernels.attention.api import attention, most_segments

__all__ = ["attention", "most_segments"]
