"""What is checked before the first step."""


class Problem(Exception):
    """What a check found wrong: one line with the likely cause and the remedy."""
