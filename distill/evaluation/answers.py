"""What a response answers, and whether a text or a choice is the right one.

A response that thinks aloud answers behind its `</think>`. There, the last `\\boxed{...}` counts,
or else what stands behind `####`, `answer is` or `answer:`. This takes time linear in the response:
what needs more is in math_check.py, under a time limit.
"""

from __future__ import annotations

import re

OPEN, _CLOSE = "<think>", "</think>"  # of what a response thinks before it answers
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_MARKED = re.compile(
    r"(?:####|\banswer\b(?:[^.:\n]{0,60}?\bis\b|\W{0,3}?:))[\s:*]*([^\n]*)", re.IGNORECASE
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FENCE = re.compile(r"^```[\w+-]*\n|\n?```$")
_DECORATION = " \t\n$*_`\"'.,;:!?()[]“”‘’"
# As an answer of the data ("B", "(B)", "B) 5"), where a response marks its answer, and elsewhere.
_GOLD_CHOICE = re.compile(r"[\s(\[*]*([A-J])(?:\s*[).:\]*]+(?:\s.*)?)?\s*", re.DOTALL)
_MARKED_CHOICE = re.compile(r"\W*(?:(?:option|choice)\W+)?([A-J])\b", re.IGNORECASE)
_BARE_CHOICE = re.compile(r"\W*([A-J])(?:\s*[).:\]]|\W*$)")
_WORD = re.compile(r"""(?<![^\s(,;:"'])[^\W\d_]{2,}(?![^\s),;:."'!?-])""")
_NAMES = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "and", "or"}
_UNIT = re.compile(r"(.*[\d})])\s*(?<!\\)\s((?:[^\W\d_.]+[. ]*)+(?:\^\{?\d\}?)?)", re.DOTALL)
_SHORT = 200  # characters of an answer with a unit
_DATE = re.compile(r"\d+(?:[-/.:]\d+){2,}")


def spoken(response: str) -> str | None:
    """The response without its thinking; None if that does not end."""
    said = response.rpartition(_CLOSE)[2]
    return None if OPEN in said else said


def last_boxed(text: str) -> str | None:
    """What the box that closes last holds; None without one."""
    content: str | None = None
    opened: list[int | None] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            if opened and (start := opened.pop()) is not None:
                content = text[start : match.start()]
        elif token[-1] == "{" and token != r"\{":
            opened.append(None if token == "{" else match.end())
    return content


def marked(text: str) -> str | None:
    """The answer, where the response says which part of it that is."""
    content = last_boxed(text)
    if content is None and (found := _MARKED.findall(text)):
        content = found[-1]
    return content


def unwrapped(text: str) -> str:
    r"""Without \text{} and its like around words."""
    return _TEXT.sub(r"\1", text).strip()


def split_unit(text: str) -> tuple[str, str]:
    """'18 dollars' as '18' and 'dollars': a value, and words behind it; '' where there are none."""
    found = _UNIT.fullmatch(text) if len(text) <= _SHORT else None
    if not found or _WORD.search(found[1]) or not _WORD.search(found[2].replace(".", "")):
        return text, ""
    return found[1].strip(), found[2].replace(".", "").strip().casefold()


def kind_of(answer: str) -> str:
    """How a response is compared with it: 'choice', 'math', or 'exact' for other text."""
    text = unwrapped(answer)
    if _GOLD_CHOICE.fullmatch(text):
        return "choice"
    value, _ = split_unit(text)
    words = {word.casefold() for word in _WORD.findall(value)} - _NAMES
    return "exact" if words or _DATE.fullmatch(value) else "math"


def is_choice(answer: str, text: str) -> bool:
    """Whether a response chooses the letter of the answer."""
    gold, content = _GOLD_CHOICE.fullmatch(unwrapped(answer)), marked(text)
    if not gold:
        return False
    if content is None:
        lines = text.strip().splitlines() or [""]
        found = _BARE_CHOICE.match(lines[-1]) or _BARE_CHOICE.match(lines[0])
    else:
        found = _MARKED_CHOICE.match(unwrapped(content))
    return found is not None and found[1].upper() == gold[1]


def is_exact(answer: str, text: str) -> bool:
    """Whether the final answer of a response is this text, but for case, space and punctuation."""
    content, lines = marked(text), text.strip().splitlines() or [""]
    said = [text, lines[-1]] if content is None else [text, content]
    return _normal(answer) in map(_normal, said)


def _normal(text: str) -> str:
    bare = unwrapped(_FENCE.sub("", text.strip()))
    # An answer may be nothing but punctuation, such as [], and an empty response is not that.
    plain = bare.strip(_DECORATION) or bare.strip(" \t\n$*_`.") or bare
    return " ".join(plain.casefold().split())
