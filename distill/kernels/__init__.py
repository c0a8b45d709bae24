"""Fused operations: each has a reference, faster implementations and one signature."""
