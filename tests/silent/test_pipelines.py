"""Pipelines of small models: a stage that has nothing to send is a stage all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.silent.small import EXACT, WIDTH, Attention, normal, with_gain
from tests.support import compiled, difference, run


class MasksFirst(nn.Module):
    """No numbered layers, and a mask that costs more elements than all that comes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(causal=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.arange(x.shape[1])
        apart = index[:, None] - index[None, :]
        mask = ((apart >= 0) & (apart < 5)).to(x.dtype)
        mask = (1.0 - mask) * -1e9
        return F.layer_norm(x + self.attention(x, mask), (WIDTH,))[:, -1]


@pytest.mark.parametrize("spec", ["pp=2", "pp=3", "pp=2,tp=2"])
def test_a_stage_of_masks_alone(spec: str) -> None:
    module = with_gain(MasksFirst())
    parallel = compiled(module, (normal(2, 24, WIDTH),), spec)
    x = normal(4, 19, WIDTH)
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= EXACT
