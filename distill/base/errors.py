"""The ways in which a run ends other than by success or by a bug."""


class UserError(Exception):
    """Bad input: the message is one line saying what, where, what is allowed and how to fix it.

    Command lines print it without a traceback and exit with status 2.
    """


class RunStopped(Exception):
    """The run cannot go on soundly; the message is one line with what to try. Exit status 1."""


class RunInterrupted(Exception):
    """The run was asked to stop and is saved; the message says how to go on. Exit status 0."""


def first_line(error: BaseException) -> str:
    """How the error's message begins; what kind of error it is where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text: str) -> str:
    """Text on one line that a terminal only shows: control and direction marks are spelt out.

    What came from files, servers and models may hold escape sequences that would drive a terminal.
    """
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
