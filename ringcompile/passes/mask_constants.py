"""Tables of positions and triangles that a model keeps as buffers, read from their numbers.

A buffer is part of the program, so what all of its elements show is a proof.
"""

from __future__ import annotations

import math

import torch

from ringcompile.ir.program import Program
from ringcompile.passes.mask_values import Affine, Choice, Condition, Test, Value

# Buffers of more elements stay what they are: comparing them would take gigabytes.
_MAX_ELEMENTS = 2**26
_POSITIONS = (torch.int64, torch.int32)


def buffer_value(program: Program, name: str) -> Value:
    """What the weight of a placeholder is as a mask, or None."""
    weight = program.weights.get(name)
    if weight is None or program.source is None or not weight.shape:
        return None
    if not 0 < math.prod(weight.shape) <= _MAX_ELEMENTS or math.prod(weight.shape[:-2]) != 1:
        return None
    tensor = program.source(weight.name)
    if type(tensor) is not torch.Tensor or tensor.is_meta:
        return None
    rows = tensor.reshape(tensor.shape[-2:])
    if rows.dim() == 1 or rows.shape[0] == 1:
        return _positions(rows.reshape(-1))
    return _triangle(rows)


def _positions(row: torch.Tensor) -> Value:
    """Evenly spaced integers along the last dim."""
    if row.dtype not in _POSITIONS:
        return None
    start = int(row[0])
    step = int(row[1]) - start if len(row) > 1 else 0
    even = torch.arange(len(row), dtype=torch.int64, device=row.device) * step + start
    return Affine.of({-1: step}, start) if torch.equal(row.to(torch.int64), even) else None


def _triangle(rows: torch.Tensor) -> Value:
    """One number on and below a diagonal, another above it."""
    below, above = rows[-1, 0], rows[0, -1]
    if below == above or min(rows.shape) < 2:
        return None
    in_row, in_column = int((rows[0] == below).sum()), int((rows[:, 0] == above).sum())
    diagonal = in_row - 1 if in_row else -in_column
    inside = torch.ones(rows.shape, dtype=torch.bool, device=rows.device).tril(diagonal)
    if not torch.equal(rows, torch.where(inside, below, above)):
        return None
    test = Affine.of({-2: 1, -1: -1}, diagonal)
    if rows.dtype == torch.bool:
        return Condition((Test(test if below else test.scaled(-1) + Affine((), -1), None),))
    return Choice(Condition((Test(test, None),)), float(below), float(above))
