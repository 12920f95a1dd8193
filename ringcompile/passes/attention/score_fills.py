"""Numbers that a model puts in place of scores: which hide a key, and how the others stay numbers.

-inf hides a key from a query. So does the most negative number of the scores' dtype, and -1e9 or
less, since float32 tells no scores of that size apart; a row of nothing else is dealt with where
attention is written. Any other number is a score like all others: a real one may lie below it.
Where it stands for the same keys in all rows it can be kept exactly. The key becomes 0, so that its
score is 0 before the number is added as a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.attention.score_steps import Fill, NotUnderstoodError
from ringcompile.passes.base import Builder
from ringcompile.passes.masks.operands import broadcast

aten = torch.ops.aten
_LOWEST = -9e8  # -1e9 as bfloat16 rounds it is above -1e9


def hides(fill: Fill, dtype: torch.dtype) -> bool:
    """Whether a number in place of scores of that dtype leaves a key no weight beside others."""
    return fill.value <= max(_LOWEST, torch.finfo(dtype).min)


def kept_as_numbers(
    builder: Builder, k: fx.Node, fills: Sequence[tuple[Fill, fx.Node]], bias: fx.Node | None
) -> tuple[fx.Node, fx.Node | None]:
    """Keys and a bias that give each filled score its number.

    Args:
        builder: of the graph.
        k: keys [B, G, Sk, D].
        fills: in order, each with where scores stay: bool in 4 dims.
        bias: what is added to scores before them, in 4 dims.

    Raises:
        NotUnderstoodError: the number stands for other keys from row to row.
    """
    for fill, visible in fills:
        batch, heads, rows, keys = type_of(visible).shape
        if rows != 1 or heads not in (1, type_of(k).shape[1]):
            raise NotUnderstoodError(
                f"{fill.value:g} in place of a masked score leaves some attention weight on that "
                "key, and which keys are masked differs from row to row"
            )
        dtype = type_of(k if bias is None else bias).dtype
        if float(torch.tensor(fill.value, dtype=dtype)) != fill.value:
            raise NotUnderstoodError(f"{fill.value:g} in place of a score is rounded in {dtype}")
        hidden = builder.call(aten.logical_not.default, (visible,), type_of(visible))
        column = TensorType.whole(torch.bool, (batch, heads, keys, 1))
        by_key = builder.call(aten.permute.default, (hidden, [0, 1, 3, 2]), column)
        k = builder.call(aten.masked_fill.Scalar, (k, by_key, 0.0), type_of(k))
        if bias is None:
            type_ = TensorType.whole(dtype, (1, 1, 1, 1))
            bias = builder.call(aten.full.default, ([1, 1, 1, 1], 0.0), type_, dtype=dtype)
        bias = builder.call(
            aten.where.ScalarSelf, (hidden, fill.value, bias), broadcast([hidden, bias], dtype)
        )
    return k, bias
