"""Roles are read off graphs; what is drawn for them covers tables, masks and thresholds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile import execution
from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.numerics.draw import PADDING, Draw, draw_inputs
from ringcompile.numerics.lengths import lengths_to_try, longer, thresholds
from ringcompile.numerics.roles import Role, roles_of
from ringcompile.passes.base import Pipeline
from ringcompile.passes.canonicalize.canonicalize import Canonicalize
from ringcompile.passes.cleanup import CleanUp
from tests.support import zoo_program


class Everything(nn.Module):
    """One input of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(41, 16)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor,
        lengths: torch.Tensor, documents: torch.Tensor, bias: torch.Tensor, angle: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        x = self.words(ids) * (ids != 3).unsqueeze(-1) + self.places(position_ids + 2)
        x = x * (angle[..., None].float() * 0.1).cos()
        scores = x @ x.transpose(1, 2) + bias[:, 0]
        same = documents[:, :, None] == documents[:, None, :]
        scores = scores.masked_fill(~(same & seen & mask.bool()[:, None]), -1e9)
        x = scores.softmax(-1) @ x
        return x[torch.arange(x.shape[0]), lengths - 1]


@cache
def everything() -> Program:
    """As an artifact keeps it, in few ops."""
    ids, square = torch.zeros(2, 13, dtype=torch.int64), torch.zeros(2, 1, 13, 13)
    args = (ids, ids + 1, ids + 0, ids[:, 0] + 1, ids * 1, square, ids * 2, square[:, 0].bool())
    return Pipeline([Canonicalize(), CleanUp()]).run(capture(Everything().eval(), args))


def test_every_kind_of_role_is_found() -> None:
    roles = roles_of(everything())
    assert roles["ids"] == Role("index", 50, 0, (3,))
    assert (roles["position_ids"].kind, roles["position_ids"].rows) == ("positions", 41)
    assert roles["position_ids"].shift == 2
    assert (roles["lengths"].kind, str(roles["lengths"].rows)) == ("index", "s")
    assert roles["lengths"].shift == -1
    kinds = {name: role.kind for name, role in roles.items()}
    assert kinds["mask"] == "mask"
    assert kinds["documents"] == "small"
    assert kinds["angle"] == "positions"
    assert kinds["bias"] == kinds["seen"] == "pairs"


@pytest.mark.parametrize("seed", range(8))
def test_what_is_drawn_is_taken_by_the_model(seed: int) -> None:
    program, module = everything(), Everything()
    roles = roles_of(program)
    inputs = draw_inputs(program, roles, Draw(19, seed), replicas=1, shares=4)
    assert inputs["ids"].shape == ((2, 19), (1, 19), (5, 19))[seed % 3]
    assert module(**inputs).isfinite().all()
    assert bool(inputs["mask"].all()) == (PADDING[seed % 4] == "no padding")
    again = draw_inputs(program, roles, Draw(19, seed), replicas=1, shares=4)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_edges_of_all_shares_are_among_the_ids() -> None:
    program = zoo_program("llama-tiny", sequence=24)
    inputs = draw_inputs(program, roles_of(program), Draw(40, 0), replicas=1, shares=4)
    ids = set(inputs["inputs"].flatten().tolist())
    assert {0, 127, 128, 255, 256, 383, 384, 511} <= ids
    assert len(ids) > 20


def test_refused_ids_are_drawn_from_fewer_rows() -> None:
    program = everything()
    for plain in (2, 3):
        inputs = draw_inputs(program, roles_of(program), Draw(9, 0, plain), 1, 1)
        assert int(inputs["ids"].max()) < 50 >> (plain - 1)


class Thresholds(nn.Module):
    """A window of 5, a chunk of 16, positions cut at 33."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.arange(x.shape[1])
        apart = index[:, None] - index[None, :]
        seen = (apart >= 0) & (apart < 5) & (index[:, None] // 16 == index[None, :] // 16)
        x = x + index.clamp(max=33)[:, None] * 0.1
        h = x.unsqueeze(1)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=seen).squeeze(1)


def test_lengths_reach_every_threshold() -> None:
    parallel = transform(capture(Thresholds().eval(), (torch.randn(1, 24, 8),)), "ring=4")
    reference = parallel.reference
    assert reference is not None
    assert {5, 16, 33} <= set(thresholds([reference]))
    lengths = lengths_to_try([reference, *parallel.ranks()], 4, 4)
    assert {6, 17, 34} <= set(lengths)
    assert any(length % 4 == 0 for length in lengths)
    assert any(length % 4 for length in lengths)
    assert min(lengths) < 4
    assert list(longer(100, 500)) == [201, 403]


class Table(nn.Module):
    """Positions have 29 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(29, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table[: x.shape[1]]


def test_lengths_stay_in_the_range_of_the_program_and_reach_its_last_row() -> None:
    program = capture(Table().eval(), (torch.randn(1, 24, 8),))
    lengths = lengths_to_try([program], 4, 8)
    assert min(lengths) >= program.length_range[0]
    assert max(lengths) == program.length_range[1] == 29


@pytest.mark.parametrize(("spec", "batch"), [("tp=2", 1), ("dp=2", 2)])
def test_what_is_run_without_inputs_is_drawn_likewise(spec: str, batch: int) -> None:
    """Ids come from the whole vocabulary; there is a sequence for each replica."""
    parallel = transform(zoo_program("gpt-tiny", sequence=24), spec)
    (ids,) = execution.random_inputs(parallel, 500).values()
    assert list(ids.shape) == [batch, 500]
    assert (int(ids.min()), int(ids.max())) == (0, 511)
    assert ids.unique().numel() > 256
    assert torch.equal(ids, execution.random_inputs(parallel, 500)[parallel.program.inputs[0].name])
    assert execution.random_inputs(parallel, 30, 5)[parallel.program.inputs[0].name].shape[0] == 5
