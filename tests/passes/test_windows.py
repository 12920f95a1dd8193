"""Convolutions and shifts along a split sequence: a few tokens of the neighbours, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import BATCH, LOCAL, bind
from ringcompile.parallel_program import ParallelProgram
from tests.generate.models import captured
from tests.generate.test_shifts import AfterEnd
from tests.support import some_fast

WIDTH, EXACT = 8, 1e-10


class Mixing(nn.Module):
    """A projection, something made of each token's neighbours, and another projection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.each = nn.Conv1d(WIDTH, WIDTH, 4, padding=3, groups=WIDTH)
        self.dilated = nn.Conv1d(WIDTH, WIDTH, 3, dilation=2)
        self.middle = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)
        self.plane = nn.Conv2d(1, 1, (3, 1))
        self.first = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.ages = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        return self.leave(torch.tanh(self.mixed(x)) + x)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Cut(Mixing):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.each(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Twice(Mixing):
    """What is padded between the convolutions is 0.5, not made from what is in front."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        y = self.each(x.transpose(1, 2))[..., : x.shape[1]]
        return self.dilated(F.pad(y.sigmoid(), (4, 0), value=0.5)).transpose(1, 2)


class Shifted(Mixing):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.ages[0] + F.pad(x, (0, 0, 1, -1)) * (1 - self.ages[0])


class Joined(Mixing):
    """Learned entries in front."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)[:, :-2] * x


class Products(Mixing):
    """A slice of the tokens meets another slice of them."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, 1:] * x[:, :-1], (0, 0, 1, 0), value=1.0)


class Copies(Mixing):
    """A sum of copies, each of another age."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        padded, count = F.pad(x, (0, 0, 3, 0)), x.shape[1]
        return sum(self.ages[i] * padded[:, i : i + count] for i in range(4))


class Both(Mixing):
    """Tokens on both sides."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.middle(x.transpose(1, 2)).transpose(1, 2)


class Later(Mixing):
    """Each token and the next one; behind the last there is a learned entry."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([x[:, 1:], self.first[:, :1].expand(x.shape[0], -1, -1)], 1)


class Unfolded(Mixing):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        windows = F.pad(x, (0, 0, 4, 0), value=-0.5).unfold(1, 5, 1)
        return windows.mean(-1) + windows.amax(-1)


class Differences(Mixing):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diff(x, dim=1, prepend=self.first[:, :1].expand(x.shape[0], -1, -1))


class Plane(Mixing):
    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return self.plane(F.pad(x[:, None], (0, 0, 2, 0)))[:, 0]


class Attended(Mixing):
    """A convolution in front of attention, as hybrids have it."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        y = self.each(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        heads = y.unflatten(2, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class Summed(Mixing):
    """A prefix sum of what is still padded goes along the tokens, and is gathered."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 2, 0), value=0.25)
        return padded.cumsum(1)[:, : x.shape[1]]


class Fixed(Mixing):
    """Of 24 tokens: a padded value meets a table of 27 entries; only the last four are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(27, WIDTH))
        self.places = nn.Parameter(torch.randn(24, WIDTH))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        x = x + self.places
        late = F.pad(x[:, 20:], (0, 0, 20, 0))
        return (F.pad(x, (0, 0, 3, 0)) + self.table)[:, 3:] + late + F.pad(x, (0, 0, 1, -1))


class Layers(nn.Module):
    """As many layers as are compiled by their likeness."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attended() for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class OnePad(Mixing):
    """Every layer convolves the same padded tokens: they cross between stages as windows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 4) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x.transpose(1, 2), (3, 0))
        for conv, qkv in zip(self.layers, self.qkv, strict=True):
            x = x + conv(padded).transpose(1, 2)
            q, k, v = qkv(x).unsqueeze(1).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return x


# The tokens of 8 float64 that the ranks send, in all and for one sequence; None where all travel.
CASES = {
    Cut: 3, Twice: 3 + 4, Shifted: 1, Joined: 2, Products: 1, Copies: 3, Both: 4, Later: 1,
    Unfolded: 4, Differences: 1, Plane: 2,
}
ORDERS = {"contiguous": 3, "zigzag": 6}  # for ring=4, the pairs of neighbours on different ranks


def compiled(kind: type[Mixing], spec: str, batch: int = 2, **options: str) -> ParallelProgram:
    torch.manual_seed(0)
    model = kind().double().eval()
    program = rc.capture(model, (torch.randn(batch, 12, WIDTH, dtype=torch.float64),))
    parallel = rc.transform(program, spec, **options)
    parallel.model = model  # type: ignore[attr-defined]
    return parallel


def check(parallel: ParallelProgram, length: int, batch: int = 2) -> None:
    x = torch.randn(batch, length, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(
        rc.run(parallel, (x,)), parallel.model(x), rtol=EXACT, atol=EXACT  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(
    ("kind", "order"),
    some_fast(CASES, ORDERS, fast=lambda kind, order: kind in (
        (Cut, Copies, Products) if order == "zigzag" else (Both, Joined)
    )),
)
def test_only_the_ends_of_chunks_travel(kind: type[Mixing], order: str) -> None:
    parallel = compiled(kind, "ring=4", order=order)
    sent = sum(bytes_sent(parallel.rank(rank)) for rank in range(4))
    assert bind(sent, {BATCH: 1, LOCAL: 1000}) == ORDERS[order] * CASES[kind] * WIDTH * 8
    for length in (24, 13, 1):  # even, uneven, and shorter than what the ranks take
        check(parallel, length)


SPECS = ("ring=3", "ring=2,ulysses=2", "time=3", "ring=2,time=2", "ring=2,tp=2", "ring=2,dp=2")


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast((Attended, Twice, Both), SPECS, fast=lambda kind, spec: (kind, spec) in (
        (Attended, "ring=2,ulysses=2"), (Twice, "ring=2,time=2"), (Both, "ring=2,tp=2")
    )),
)
def test_beside_other_axes(kind: type[Mixing], spec: str) -> None:
    parallel = compiled(kind, spec)
    for length in (17, 2):
        check(parallel, length)


@pytest.mark.parametrize(
    "spec", ["pp=2,time=2", *(pytest.param(spec, marks=pytest.mark.slow)
                              for spec in ("pp=4,time=3", "pp=2,ring=2,time=2"))],
)
def test_windows_cross_between_stages(spec: str) -> None:
    parallel = compiled(OnePad, spec)
    for length in (17, 2):
        check(parallel, length)


def test_a_convolution_before_attention_sends_three_tokens_beside_the_keys() -> None:
    parallel = compiled(Attended, "ring=4", order="zigzag")
    shifts = [node for node in parallel.rank(1).graph.nodes
              if "shift_start" in str(node.target) and node.kwargs["of"].startswith("halo")]
    assert [node.meta["type"].shape[2] for node in shifts] == [3, 3]


def test_of_a_fixed_length_as_many_entries_by_chance_are_not_moved() -> None:
    torch.manual_seed(0)
    model, x = Fixed().double().eval(), torch.randn(2, 24, WIDTH, dtype=torch.float64)
    parallel = rc.transform(rc.capture(model, (x,)), "ring=4")
    torch.testing.assert_close(rc.run(parallel, (x,)), model(x), rtol=EXACT, atol=EXACT)
    sent = {node.kwargs["of"] for node in parallel.rank(1).graph.nodes
            if "shift_start" in str(node.target)}
    assert any(name.startswith("halo") for name in sent)


def test_flags_that_inputs_tell_are_shifted_whole_on_every_rank() -> None:
    """Where documents begin is looked up by all queries, so that windows would be gathered."""
    _, program = captured(AfterEnd, 1)
    nodes = rc.transform(program, "ring=4").rank(1).graph.nodes
    assert not [n for n in nodes if n.kwargs.get("of", "").startswith("halo")]


@pytest.mark.parametrize("order", ["zigzag", pytest.param("contiguous", marks=pytest.mark.slow)])
def test_layers_that_are_alike(order: str) -> None:
    parallel = compiled(Layers, "ring=4", order=order)  # type: ignore[arg-type]
    for length in (24, 13):
        check(parallel, length)


def test_what_goes_along_the_tokens_gets_all_of_them() -> None:
    for length in (24, 13, 1):
        check(compiled(Summed, "ring=4"), length)


def test_another_length_than_the_chunks_is_padded_to_what_neighbours_take() -> None:
    sequence = compiled(Twice, "ring=4").program.sequence
    assert sequence is not None
    assert (sequence.least, sequence.local_length(1), sequence.local_length(40)) == (4, 4, 10)
