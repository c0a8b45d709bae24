"""Causal self-attention in memory linear in the sequence length."""

from distill.kernels.attention.api import attention

__all__ = ["attention"]
