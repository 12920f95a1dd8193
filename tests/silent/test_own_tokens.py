"""Values that enter a mixture of experts split over `tp`: each rank still takes its own tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support import compiled, difference, run

EXPERTS, WIDTH, HIDDEN = 4, 16, 32


class Mixture(nn.Module):
    """Attention, and two of four experts for each token, by slots; `tp` splits what attention adds.

    Hidden states then enter the experts split over features, and are not the sums that `tp` makes.
    """

    def __init__(self, by_slots: bool) -> None:
        super().__init__()
        self.by_slots = by_slots
        self.qkv, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2)
        mixed = self.slots if self.by_slots else self.sorted
        return x + mixed(x.flatten(0, 1)).view_as(x)

    def slots(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        taken = F.one_hot(chosen, EXPERTS).flatten(0, 1)
        slot = chosen.flatten() * tokens + (taken.cumsum(0) * taken).sum(-1) - 1
        slots = x.new_zeros(EXPERTS * tokens, WIDTH)
        slots = slots.index_copy(0, slot, x.repeat_interleave(2, 0)).view(EXPERTS, tokens, WIDTH)
        h = F.silu(torch.bmm(slots, self.up.transpose(1, 2)))
        y = torch.bmm(h, self.down.transpose(1, 2)).flatten(0, 1)
        return (y[slot].view(tokens, 2, WIDTH) * weights[..., None]).sum(1)

    def sorted(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        order = chosen.argsort()
        rows, experts = x[order], chosen[order]
        h = F.silu(torch.einsum("td,tfd->tf", rows, self.up[experts]))
        y = torch.einsum("tf,tdf->td", h, self.down[experts])
        return torch.zeros_like(x).index_copy(0, order, y) * weights[:, None]


@pytest.mark.parametrize("by_slots", [True, False], ids=["slots", "sorted"])
@pytest.mark.parametrize(
    "spec",
    ["ring=2,tp=2", pytest.param("ep=2,tp=2", marks=pytest.mark.slow),
     pytest.param("pp=2,ring=2,tp=2", marks=pytest.mark.slow),
     pytest.param("ring=2,tp=2,time=2", marks=pytest.mark.slow),
     pytest.param("ulysses=2,tp=2", marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_each_rank_takes_its_own_tokens(spec: str, by_slots: bool) -> None:
    torch.manual_seed(0)
    model, x = Mixture(by_slots).double().eval(), torch.randn(2, 12, WIDTH, dtype=torch.float64)
    parallel = compiled(model, (x,), spec)
    for length in (12, 29, 1):
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        assert difference(run(parallel, (x,)).outputs, model(x)) < 1e-12
