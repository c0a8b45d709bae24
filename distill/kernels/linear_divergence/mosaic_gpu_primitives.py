"""Elementwise functions in the primitives that Mosaic GPU has.

A user's divergence is any jax.numpy, and jax.jvp adds to it; Mosaic GPU lacks a few of their
primitives (as of jax 0.11: add_any, log1p, expm1, pow, sqrt and others). They are written in terms
of those it has.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal


def lowerable(function: Callable, *examples) -> Callable:
    """An elementwise function in primitives that Mosaic GPU lowers.

    A primitive that is neither known to it nor listed below is an error when the kernel is lowered.
    """
    program, results = jax.make_jaxpr(function, return_shape=True)(*examples)

    def function_of_known_primitives(*args):
        results_flat = _evaluate(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(results), results_flat)

    return function_of_known_primitives


def _evaluate(program, args: list) -> list:
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars + jaxpr.invars, [*program.consts, *args], strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs = [read(atom) for atom in equation.invars]
        if name in _CALLS:
            outputs = _evaluate(params[_CALLS[name]], inputs)
        elif name in _SUBSTITUTES:
            outputs = [_SUBSTITUTES[name](*inputs, **params)]
        else:
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _log1p(x, **_):
    # Kahan: what rounding did to 1 + x cancels in the quotient.
    rounded = 1.0 + x
    return jnp.where(rounded == 1.0, x, jnp.log(rounded) * (x / (rounded - 1.0)))


def _expm1(x, **_):
    rounded = jnp.exp(x)
    near_zero = jnp.where(rounded == 1.0, x, (rounded - 1.0) * (x / jnp.log(rounded)))
    return jnp.where(jnp.abs(x) < 0.5, near_zero, rounded - 1.0)


def _pow(x, y, **_):
    # Of a base that is not negative, as probabilities are; NaN otherwise.
    return _select_n(y == 0, jnp.exp(y * jnp.log(x)), jnp.ones_like(x))


def _select_n(which, *cases):
    return lax.select_n(jnp.broadcast_to(which, cases[0].shape), *cases)


def _integer_pow(x, *, y: int):
    return lax.integer_pow(x, y) if y >= 0 else 1.0 / lax.integer_pow(x, -y)


def _sqrt(x, **_):
    return jnp.where(x == 0.0, 0.0, x * lax.rsqrt(x))


# Primitives that hold a program, and under which name.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr"}
_SUBSTITUTES: dict[str, Callable] = {
    "add_any": lax.add,
    "expm1": _expm1,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": _log1p,
    "pow": _pow,
    "select_n": _select_n,
    "sqrt": _sqrt,
    "stop_gradient": lambda x: x,
}
