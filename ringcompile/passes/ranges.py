"""`arange` from positions: what a rank, or a call with a cache, has of a range of numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import equal, is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder

aten = torch.ops.aten


def range_at(builder: Builder, positions: fx.Node, call: Call, type_: TensorType) -> fx.Node:
    """`start + step * positions` in the dtype of an `arange`.

    Args:
        builder: writes the graph.
        positions: int64, which of the range's numbers are wanted.
        call: the `arange`.
        type_: of the result.
    """
    start, step, here = call["start"], call["step"], positions
    if not (_is_whole(start) and _is_whole(step)):  # torch counts in float64, whatever the dtype
        here = builder.call(
            aten.to.dtype, (here, torch.float64), replace(type_of(here), dtype=torch.float64)
        )
    if not equal(step, 1):
        here = builder.call(aten.mul.Tensor, (here, step), type_of(here))
    if not equal(start, 0):
        here = builder.call(aten.add.Tensor, (here, start), type_of(here))
    if type_.dtype != type_of(here).dtype:
        here = builder.call(aten.to.dtype, (here, type_.dtype), type_)
    return here


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (is_symbolic(value) and value.is_integer is True)
