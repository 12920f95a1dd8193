"""Inputs whose values the model's code turns into numbers: constants, and other values refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ringcompile as rc
from tests.support import compiled, difference, run

WIDTH = 16


class Tower(nn.Module):
    """Patches of images attend within pieces that a grid of rows and columns tells; text to all."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.ids = nn.Embedding(32, WIDTH), nn.Embedding(40, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def pieces(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Every other column first, in an order that leaves padding out; and lengths of pieces."""
        orders, lengths, start = [], [0], 0
        for rows, columns in grid.tolist():
            index = F.pad(torch.arange(rows * columns).view(rows, columns), (0, 1), value=-1)
            index = index[:, ::2].flatten().tolist() + index[:, 1::2].flatten().tolist()
            order = torch.tensor(index)
            orders.append(order[order >= 0] + start)
            lengths.append(lengths[-1] + rows * columns)
            start += rows * columns
        bounds = torch.unique_consecutive(torch.tensor(lengths))
        return torch.cat(orders), (bounds[1:] - bounds[:-1]).tolist()

    def forward(
        self, ids: torch.Tensor, patches: torch.Tensor, grid: torch.Tensor
    ) -> torch.Tensor:
        order, lengths = self.pieces(grid)
        x = (patches + self.places(torch.arange(patches.shape[0])))[order]
        seen = [self.attention(piece[None], piece[None])[0] for piece in x.split(lengths)]
        images = torch.cat(seen)[torch.argsort(order)]
        y = self.ids(ids)
        return self.out(self.attention(y, y, causal=True) + images.mean(0))

    @staticmethod
    def attention(x: torch.Tensor, y: torch.Tensor, causal: bool = False) -> torch.Tensor:
        q, k = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (x, y))
        return F.scaled_dot_product_attention(q, k, k, is_causal=causal).transpose(1, 2).flatten(2)


class Padded(nn.Module):
    """Lengths as numbers of a tensor, not of Python: they may be others in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = nn.Embedding(40, WIDTH)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        seen = torch.arange(ids.shape[1]) < lengths[:, None]
        x = self.ids(ids)[:, None]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen[:, None, None])


class Chosen(nn.Module):
    """Code that decides by the tokens themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = nn.Embedding(40, WIDTH)

    def forward(self, ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        x = self.ids(ids)
        return x * 2 if (others == 3).any() else x


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().double().eval().requires_grad_(False)


def inputs(length: int, grid: list[list[int]]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    count = sum(rows * columns for rows, columns in grid)
    return (torch.randint(0, 40, (2, length), generator=generator),
            torch.randn(count, WIDTH, generator=generator, dtype=torch.float64),
            torch.tensor(grid))


GRID = [[2, 3], [4, 3]]


@pytest.mark.parametrize("spec", ["ring=4", "ring=2,tp=2", "dp=2,ring=2"])
def test_pieces_by_a_grid_match_at_any_length_of_text(tower: Tower, spec: str) -> None:
    made = compiled(tower, inputs(9, GRID), spec)
    for length in (9, 14, 3):
        given = inputs(length, GRID)
        assert difference(run(made, given).outputs, tower(*given)) < 1e-12
    assert made.program.notes[0] == (
        "the program is for these values of the input 'grid' alone, because the model's code "
        "decides by them: [[2, 3], [4, 3]]"
    )


def test_another_grid_is_refused(tower: Tower, tmp_path: Path) -> None:
    made = compiled(tower, inputs(9, GRID), "ring=2")
    made.save(tmp_path / "out")
    for program in (made, rc.load(tmp_path / "out")):
        with pytest.raises(rc.RingCompileError) as refusal:
            rc.run(program, inputs(9, [[4, 3], [2, 3]]))
        assert refusal.value.message == (
            "input 'grid' is [[4, 3], [2, 3]]: the program is for [[2, 3], [4, 3]] alone"
        )
        assert "capture the model with an example that has these values" in str(refusal.value)


def test_values_that_no_number_is_made_of_stay_free() -> None:
    torch.manual_seed(0)
    model = Padded().double().eval().requires_grad_(False)
    ids = torch.randint(0, 40, (2, 12))
    made = compiled(model, (ids, torch.tensor([12, 5])), "ring=4")
    assert made.program.inputs[1].values is None
    given = (ids, torch.tensor([3, 9]))
    assert difference(run(made, given).outputs, model(*given)) < 1e-12


def test_tokens_are_no_constants() -> None:
    others = torch.arange(7).expand(2, 7)
    with pytest.raises(rc.RingCompileError, match="depends on the values of a tensor"):
        rc.capture(Chosen(), (torch.zeros(2, 12, dtype=torch.long), others))
