"""The part of answer checking that runs in worker processes: it must stay quick to import."""

import logging
import resource
import sys

_MEMORY_BYTES = 4 * 2**30


def prepare_worker() -> None:
    """Limits memory, and warms up, so that no answer's clock pays for imports and first calls."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    matches("1", r"\boxed{1}")
    # A huge power must fail here, before the machine has to choose which process to end.
    if sys.platform == "linux":  # macOS refuses to limit address space
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def matches(answer: str, response: str) -> bool:
    """Whether the final expression of `response` equals `answer` (LaTeX or plain), by math-verify.

    Without a time limit: hostile expressions can run forever.
    """
    from math_verify import parse, verify

    # math-verify's own limits need signals of a main thread; the process is the limit here.
    # A '$' in an answer may be money ('\$18'), so it says nothing about where the answer ends.
    marked = answer if "\\boxed" in answer else f"\\boxed{{{answer}}}"
    gold = parse(marked, parsing_timeout=None)
    return verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None)
