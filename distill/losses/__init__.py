"""Divergences between two next-token distributions and the training objective made of them."""
