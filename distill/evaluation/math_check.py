"""The part of answer checking that runs in worker processes: it must stay quick to import."""

import ctypes
import logging
import multiprocessing
import os
import resource
import signal
import sys

_MEMORY_BYTES = 4 * 2**30
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def prepare_worker() -> None:
    """Limits memory, and warms up, so that no answer's clock pays for imports and first calls."""
    _end_with_parent()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if not matches("1", r"\boxed{1}"):
        raise RuntimeError("math-verify does not find that 1 equals 1")
    # A huge power must fail here, before the machine has to choose which process to end.
    if sys.platform == "linux":  # macOS refuses to limit address space
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _end_with_parent() -> None:
    """Has the kernel end this process with its parent, even in the midst of a long computation.

    A thread that watches the parent would not do: the power of a huge number does not let it run.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the call above
        os._exit(1)


def matches(answer: str, response: str) -> bool:
    """Whether the final expression of `response` equals `answer` (LaTeX or plain), by math-verify.

    What cannot be compared does not match. Without a time limit: hostile expressions can run
    forever.
    """
    from math_verify import parse, verify

    try:
        return _matches(parse, verify, answer, response)
    # Anything comes out of it: from the parser, from SymPy, of memory, of the stack. An exception
    # may even be one that cannot be sent to the parent.
    except Exception:
        return False


def _matches(parse, verify, answer: str, response: str) -> bool:
    # math-verify's own limits need signals of a main thread; the process is the limit here.
    # A '$' in an answer may be money ('\$18'), so it says nothing about where the answer ends.
    marked = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
    gold = parse(marked, parsing_timeout=None)
    return verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None)
