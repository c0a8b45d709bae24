"""The part of answer checking that runs in worker processes: it must stay quick to import."""

import itertools
import logging
import re
from collections.abc import Callable, Sequence

from distill.base.worker import limit_memory
from distill.evaluation.answers import last_boxed, marked, split_unit, unwrapped

_MEMORY_BYTES = 4 * 2**30
_DEEPEST = 100  # brackets within brackets
_SHORT = 200  # characters of an answer that nothing marks
_DECIMALS = 12  # by which numbers are compared: 0.333333 is not 1/3

_MONEY = re.compile(r"\\?[$€£]")
_PERCENT = re.compile(r"\\?%")
_BASE = re.compile(r"[0-9A-Fa-f]+_\{?(\d+)\}?")  # a number with the base in which it is written
_SPACE = r"(?:,?\\[,;:! ]|\{,\}|[ \u00a0\u2009\u202f])"
# How people write numbers, as math-verify takes them.
_NUMBERS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (
        re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)"),
        lambda match: re.sub(r"\D", "", match[0]),
    ),
    (re.compile(r"(?<![\d./^_])(\d+)\s+(\d+)/(\d+)"), r"(\1+\\frac{\2}{\3})"),
    (re.compile(r"(?<=\d)[eE]([+-]?\d+)(?!\w)"), r"\\times10^{\1}"),
    (
        re.compile(r"(?<![\\A-Za-z])(?=(?:sin|cos|tan|cot|sec|csc|log|ln)\s*\(|pi(?![A-Za-z]))"),
        r"\\",
    ),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?|°"), ""),
    (re.compile(r"\\varnothing|\\\{\s*\\\}|∅"), r"\\emptyset"),
]


def prepare_worker() -> None:
    """Limits memory, and warms up, so that no answer's clock pays for imports and first calls."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if not _verify(r"\boxed{1}", r"\boxed{1.0}"):  # what is equal as text never gets that far
        raise RuntimeError("math-verify does not find that 1 equals 1")
    limit_memory(_MEMORY_BYTES)


def matches(answers: Sequence[str], text: str) -> bool:
    """Whether the final expression of `text` equals one of `answers` (LaTeX or plain).

    What cannot be compared does not match. Without a time limit: hostile expressions can run
    forever.
    """
    return any(_equals(answer, text) for answer in answers)


def _equals(answer: str, text: str) -> bool:
    answer, boxed = _plain(last_boxed(answer) or answer), last_boxed(text)
    if boxed is not None:
        return _is_equal(answer, boxed)
    if "\\boxed{" in text:
        return False  # one that was cut off
    # Else what is marked, or all of a short response; and what math-verify finds in it.
    said = (marked(text) or text).strip(" *\n")
    is_short = "\n" not in said and len(said) <= _SHORT
    if is_short and (_units_differ(answer, _plain(said)) or "####" in text):
        return _is_equal(answer, said)
    if is_short and _is_equal(answer, said):
        return True
    return _same(_boxed(answer), _with_plain_numbers(text))


def _is_equal(answer: str, said: str) -> bool:
    """Whether two expressions are the same as a person reads them."""
    if _depth(said) > _DEEPEST:
        return False
    said = _plain(said)
    bases = {found[1] for each in (answer, said) if (found := _BASE.fullmatch(each))}
    if len(bases) > 1:
        return False
    if (answer[:2] == r"\{") != (said[:2] == r"\{") and {answer[:1], said[:1]} & set("(["):
        return False  # a set is no pair and no interval
    if _units_differ(answer, said):
        return False
    values = split_unit(answer)[0], split_unit(said)[0]
    pairs = dict.fromkeys([(answer, said), values])
    return any(x == y or _same(_boxed(x), _boxed(y)) for x, y in pairs)


def _units_differ(answer: str, said: str) -> bool:
    """Whether both have one, and neither abbreviates the other."""
    short, long = sorted((split_unit(answer)[1], split_unit(said)[1]), key=len)
    letters = iter(long)
    return bool(short) and not all(letter in letters for letter in short)


def _same(answer: str, said: str) -> bool:
    """By math-verify; a percentage equals the number before its sign."""
    if ("%" in answer) != ("%" in said):
        return _verify(answer, said) or _verify(*(_PERCENT.sub("", x) for x in (answer, said)))
    return _verify(answer, said)


def _verify(answer: str, said: str) -> bool:
    from math_verify import parse, verify

    try:
        # math-verify's own limits need signals of a main thread; the process is the limit here.
        both = (parse(text, parsing_timeout=None) for text in (answer, said))
        options = dict(float_rounding=_DECIMALS, allow_set_relation_comp=True)
        return verify(*both, timeout_seconds=None, **options)
    # Anything comes out of it: from the parser, from SymPy, of memory, of the stack. An exception
    # may even be one that cannot be sent to the parent.
    except Exception:
        return False


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _plain(text: str) -> str:
    """An answer as math-verify reads it: a '$' may be money, so it says nothing here."""
    return _with_plain_numbers(unwrapped(_MONEY.sub("", text))).strip().removesuffix(".")


def _with_plain_numbers(text: str) -> str:
    for pattern, replacement in _NUMBERS:
        text = pattern.sub(replacement, text)
    return text


def _depth(text: str) -> int:
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    return max(depths, default=0)
