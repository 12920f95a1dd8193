"""The multiplications of a call, which balance the stages of a pipeline, against counts by hand."""

from typing import Any

import pytest
import torch
from torch import fx

from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.stages.split_pipeline import work

aten = torch.ops.aten
SCALE = {"scale": 0.5}


@pytest.mark.parametrize(
    ("target", "operands", "out", "keywords", "count"),
    [
        (aten.linear.default, [(2, 3, 8), (5, 8), (5,)], (2, 3, 5), {}, 6 * 8 * 5),
        # The bias comes first: its size is not what is summed over.
        (aten.addmm.default, [(32,), (6, 8), (8, 32)], (6, 32), {}, 6 * 8 * 32),
        (aten.addmm.default, [(8,), (6, 32), (32, 8)], (6, 8), {}, 6 * 32 * 8),
        (aten.baddbmm.default, [(1, 5), (4, 3, 8), (4, 8, 5)], (4, 3, 5), {}, 4 * 3 * 8 * 5),
        (aten.matmul.default, [(4, 3, 8), (1, 8, 5)], (4, 3, 5), {}, 4 * 3 * 8 * 5),
        (aten._grouped_mm.default, [(6, 8), (2, 8, 5)], (6, 5), {}, 6 * 8 * 5),
        (aten.conv1d.default, [(2, 4, 10), (6, 4, 3)], (2, 6, 8), {}, 2 * 6 * 8 * 12),
        (op("attention"), [(2, 4, 6, 8), (2, 2, 7, 8), (2, 2, 7, 8)], (2, 4, 6, 8), SCALE,
         2 * 2 * 4 * 6 * 7 * 8),
        (op("expert_linear"), [(6, 8), (6,), (4, 5, 8)], (6, 5), {}, 6 * 8 * 5),
        (op("grouped_linear"), [(6, 8), (4,), (4, 5, 8)], (6, 5), {}, 6 * 8 * 5),
        (aten.exp.default, [(2, 3)], (2, 3), {}, 6),
    ],
    ids=str,
)
def test_multiplications(
    target: Any, operands: list[tuple[int, ...]], out: tuple[int, ...], keywords: dict[str, Any],
    count: int,
) -> None:
    graph = fx.Graph()
    nodes = []
    for i, shape in enumerate(operands):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["type"] = TensorType.whole(torch.float32, shape)
    call = graph.call_function(target, tuple(nodes), keywords)
    call.meta["type"] = TensorType.whole(torch.float32, out)
    assert work(call) == count
