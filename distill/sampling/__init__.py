"""Sampling from the student: token choice and the jitted decode loop."""
