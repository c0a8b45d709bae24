"""Prompts and reference answers: sources, tokenisation and the order in which they are served."""
