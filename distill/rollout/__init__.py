"""Backends that turn prompts into rollouts, behind one protocol."""
