"""Joint attention over text and image tokens: a rank computes its image tokens and no others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.communication import ALL_REDUCE, GATHER
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from tests.joint import DIM, JointModel
from tests.shares import products_of, with_share
from tests.support import difference, run, some_fast

CAPTURED, LENGTH, TEXT = 12, 17, 5
SPECS = ("ring=4", "ulysses=2", "ring=2,ulysses=2", "tp=2", "ring=2,tp=2", "dp=2,ring=2",
         "pp=2,ring=2", "ring=2,tile=2", "time=2")


def inputs(image: int, rotary: str, masked: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(image)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    made = {
        "image": normal(2, image, 4), "text": normal(2, TEXT, DIM), "step": normal(2, DIM),
        "angles": normal(image if rotary == "image" else image + TEXT, 2),
    }
    if masked:
        made["mask"] = torch.ones(2, TEXT)
        made["mask"][1, 3:] = 0
    return made


def program(model: nn.Module, fixed: bool, given: dict[str, torch.Tensor]) -> Program:
    dims = {name: {0: "batch"} for name in given if name != "angles"}
    if not fixed:
        dims["image"][1] = "sequence"
    dims["angles"] = {} if fixed else {0: "sequence"}
    return capture(model, (), given, dims=dims)


@torch.no_grad()
def check(spec: str, fixed: bool, image_first: bool, masked: bool) -> None:
    torch.manual_seed(0)
    rotary = "joint" if fixed and masked else "image"
    model = JointModel(image_first=image_first, rotary=rotary).double().eval()
    there = inputs(LENGTH, rotary, masked)
    here = there if fixed else inputs(CAPTURED, rotary, masked)
    parallel = transform(program(model, fixed, here), spec)
    assert difference(run(parallel, there).outputs, model(**there)) < 1e-12
    if "ring" not in spec and "ulysses" not in spec:
        return
    # All that the second block and what is behind it compute for image tokens, and no text's.
    own = [type_ for type_ in products_of(parallel.program) if with_share(type_)]
    assert len(own) >= 9
    along = [node for node in parallel.program.graph.nodes if "tp" not in str(node.kwargs)]
    assert sum(str(node.target) == GATHER for node in along) == 1  # the result
    text = [type_of(node) for node in along if str(node.target) == ALL_REDUCE]
    assert [type_.shape[1] for type_ in text] == [TEXT, TEXT]  # of each block's attention


@pytest.mark.parametrize(
    ("spec", "fixed", "image_first", "masked"),
    some_fast(
        SPECS, (False, True), (False, True), (False, True),
        fast=lambda spec, fixed, first, masked: (
            spec == "ring=2,ulysses=2" and fixed == first == masked
        ),
    ),
)
def test_ranks_compute_their_image_tokens(
    spec: str, fixed: bool, image_first: bool, masked: bool
) -> None:
    check(spec, fixed, image_first, masked)


class OverText(nn.Module):
    """Image tokens of a fixed number that attend over text alone; no token sees another one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, 4)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        k, v = self.kv(text)[:, None].chunk(2, -1)
        x = x + F.scaled_dot_product_attention(self.q(x)[:, None], k, v)[:, 0]
        return self.out(x)


@torch.no_grad()
def test_what_attends_over_text_alone_is_split() -> None:
    torch.manual_seed(0)
    model = OverText().double().eval()
    given = {"x": torch.randn(2, LENGTH, DIM).double(), "text": torch.randn(2, TEXT, DIM).double()}
    captured = capture(model, (), given, dims={name: {0: "batch"} for name in given})
    parallel = transform(captured, "ring=4")
    assert parallel.program.sequence is not None
    assert parallel.program.sequence.length == LENGTH
    assert difference(run(parallel, given).outputs, model(**given)) < 1e-12
    assert sum(map(with_share, products_of(parallel.program))) == 2  # queries, and the last one
