"""Tables of positions and triangles that a model keeps as buffers, read from their numbers.

A buffer is part of the program, so what all of its elements show is a proof.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ringcompile.ir.program import Program
from ringcompile.ops.blocks import Band
from ringcompile.passes.masks.values import Affine, Choice, Condition, Value, implied

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
    return _diagonals(rows)


def _positions(row: torch.Tensor) -> Value:
    """Evenly spaced integers along the last dim."""
    if row.dtype not in _POSITIONS:
        return None
    start = int(row[0])
    step = int(row[1]) - start if len(row) > 1 else 0
    even = torch.arange(len(row), dtype=torch.int64, device=row.device) * step + start
    return Affine.of({-1: step}, start) if torch.equal(row.to(torch.int64), even) else None


def _diagonals(rows: torch.Tensor) -> Value:
    """Two numbers, one of them on a run of diagonals: a triangle, a window."""
    if min(rows.shape) < 2 or not torch.equal(rows[1:, 1:], rows[:-1, :-1]):
        return None
    by_distance = torch.cat([rows[0].flip(0), rows[1:, 0]])  # from row - column = 1 - columns on
    numbers = by_distance.unique()
    if len(numbers) != 2:
        return None
    for inside, outside in (numbers.flip(0), numbers):
        places = (by_distance == inside).nonzero().flatten()
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places):
            continue
        start = 1 - rows.shape[1]
        band = Band(first + start if first else None,
                    last + start if last + 1 < len(by_distance) else None)
        condition = Condition(tuple(replace(t, implied=False) for t in implied(band)))
        if rows.dtype != torch.bool:
            return Choice(condition, float(inside), float(outside))
        return condition if inside else condition.negated()
    return None
