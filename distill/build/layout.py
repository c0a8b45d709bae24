"""The shapes of microbatches."""

from __future__ import annotations

import dataclasses

from distill.base.errors import UserError
from distill.base.sharding import AnyMesh, axis_parts, batch_axes, batch_parts, round_up
from distill.batches.packing import Layout, Shape
from distill.config.policy import Policy, tokens_per_microbatch


def build_layout(policy: Policy, longest: int, mesh: AnyMesh, view_excess: int = 0) -> Layout:
    """The microbatches of a batch whose sequences have at most `longest` tokens.

    What the teacher reads may be `view_excess` tokens longer.

    Raises:
      UserError: the mesh divides neither rows nor their lengths.
    """
    unit, length = axis_parts(mesh, "position"), policy.max_total_sequence_length
    if length % unit:
        raise UserError(
            f"policy.max_total_sequence_length={length} does not divide over mesh.context={unit} "
            f"devices: try {round_up(length, unit)}"
        )
    layout = _of_students(policy, longest, mesh)
    shapes = (Shape(shape.rows, round_up(shape.length, unit)) for shape in layout.shapes)
    return dataclasses.replace(
        layout, shapes=tuple(shapes), view_excess=round_up(view_excess, unit)
    )


def _of_students(policy: Policy, longest: int, mesh: AnyMesh) -> Layout:
    parts, budget = batch_parts(mesh), tokens_per_microbatch(policy)
    if policy.sequence_packing.enabled:
        length = policy.max_total_sequence_length
        return Layout((Shape(_rows(budget, length, parts), length),), packed=True)
    if not policy.dynamic_batching.enabled:
        return Layout((Shape(policy.train_micro_batch_size, longest),))
    unit = policy.dynamic_batching.sequence_length_round
    halves = (-(-longest // (2**halvings * unit)) * unit for halvings in range(3))
    lengths = sorted({min(length, longest) for length in halves})
    return Layout(tuple(Shape(_rows(budget, length, parts), length) for length in lengths))


def _rows(budget: int, length: int, parts: int) -> int:
    """Rows of `length` tokens within the budget, as many on every part of the mesh."""
    rows = budget // length // parts * parts
    if not rows:
        raise UserError(
            f"microbatches of {budget} tokens hold no row of {length} tokens on each of {parts} "
            f"devices ({batch_axes()}): set train_mb_tokens to at least {parts * length}"
        )
    return rows
