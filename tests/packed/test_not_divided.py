"""Packed weights that a plan cannot cut: computed from the whole, and the user is told why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.packed.layouts import LAYOUTS, Packed
from tests.support import compiled, difference, run


class Mlp(nn.Module):
    """Attention without weights, and an MLP of packed layers: 16 -> 48 -> 16."""

    def __init__(self, up: type[Packed], down: type[Packed], group: int) -> None:
        super().__init__()
        self.up, self.down = up(16, 48, group), down(48, 16, group)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        y = F.rms_norm(y.transpose(1, 2).flatten(2), (16,))
        return self.down(F.silu(self.up(y)))


def said(ranks: str, weights: str, why: str, fits: str) -> str:
    return (
        f"{ranks} does not divide the tensors that a packed weight is unpacked from, {weights}: "
        f"{why}. Each rank "
        f"unpacks all of it and keeps its part; {fits} would divide it"
    )


def cut(have: str, made: str) -> str:
    return f"{have} seen as {made} would be split inside a quantization group or a byte"


CASES = {  # layout of the outputs' layer, of the inputs' layer, group, plan, what is said
    "a group": (
        "int8", "int4 in bytes", 16, "tp=2",
        [said("tp=2", "'packed' [16, 24], 'scales' [16, 3]", cut("[16, 3, 16]", "[16, 48]"),
              "tp=3")],
    ),
    "an int32": (
        "AWQ, order in the shifts", "int8", 8, "tp=4",
        [said("tp=4", "'qweight' [16, 6], 'lifted_tensor_1' [8]", cut("[16, 6, 8]", "[16, 48]"),
              "tp=3"),
         said("tp=4", "'qzeros' [2, 6], 'lifted_tensor_0' [8]", cut("[2, 6, 8]", "[2, 48]"),
              "tp=3")],
    ),
    "planes": (
        "ternary in planes", "int8", 8, "tp=2",
        [said("tp=2", "'packed' [12, 16]", "cat of [12, 16], [12, 16], [12, 16], [12, 16] needs "
              "the whole dim that would be split", "no size of tp")],
    ),
    "a scale of fp8": (
        "int8", "fp8, scales repeated", 16, "ring=2,tp=2",
        [said("tp=2", "'weight_scale_inv' [1, 3]", cut("[16, 3, 16]", "[16, 48]"), "tp=3")],
    ),
    "a block of a file": (
        "int8", "GGUF Q8_0", 16, "tp=4",
        [said("tp=4", "'weight' [16, 54]", cut("[48, 16]", "[16, 48]"), "tp=3")],
    ),
    "nothing": ("int4 in bytes", "NF4", 8, "tp=2", []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_plan_cannot_cut_is_unpacked_whole(case: str) -> None:
    up, down, group, spec, notes = CASES[case]
    torch.manual_seed(0)
    model = Mlp(LAYOUTS[up], LAYOUTS[down], group).eval()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    parallel = compiled(model, (x,), spec)
    assert difference(run(parallel, (x,)).outputs, model(x)) < 1e-12
    assert sorted(note.partition(": ")[2] for note in parallel.notes) == sorted(notes)
