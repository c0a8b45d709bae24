"""The part of `python_tool` that runs in a worker process: it must stay quick to import."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from distill.base.worker import limit_memory

_MEMORY_BYTES = 2**30
_LONGEST = 1000  # characters of an expression
_DIGITS = 12  # of a result that is no whole number

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def prepare_worker() -> None:
    """A huge power fails, and the run goes on."""
    limit_memory(_MEMORY_BYTES)


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression in Python's syntax: numbers, operators, brackets."""
    try:
        if len(expression) > _LONGEST:
            raise ValueError("too long")
        value = _value(ast.parse(expression, mode="eval").body)
        if isinstance(value, complex):  # a root of a negative number
            raise ValueError("not a real number")
        return str(value) if isinstance(value, int) else f"{value:.{_DIGITS}g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (ArithmeticError, MemoryError, RecursionError):
        return "error: too large"
    except (SyntaxError, TypeError, ValueError) as error:
        return f"error: {error.args[0] if error.args else 'not an expression'}"


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        if not isinstance(node.value, bool):
            return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("only numbers, operators and brackets are allowed")
