"""Hugging Face checkpoints: finding, reading and writing them."""
