"""Rows are sorted by expert once for all matmuls of a mixture, if nothing asks for their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringcompile.ops import experts
from ringcompile.ops.schemas import op
from tests.support import TOLERANCE, compiled, difference, run

SIZE, INNER, EXPERTS, TOP = 16, 24, 6, 2


def linear(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    run_ = op("expert_linear") if torch.compiler.is_exporting() else experts.expert_linear
    return run_(x, expert, weight, bias)


class Mixture(nn.Module):
    """Two matmuls a choice, with a function between them; the router may skip experts."""

    def __init__(self, between: Callable[[Tensor, nn.Module], Tensor], skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between, self.skip = between, skip
        self.router = nn.Linear(SIZE, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, SIZE) / 4)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER))
        self.down = nn.Parameter(torch.randn(EXPERTS, SIZE, INNER) / 5)
        self.scale = nn.Parameter(torch.randn(INNER))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, SIZE)
        weights, index = self.router(tokens).softmax(-1).topk(TOP)
        if self.skip:
            index = torch.where(weights > 0.3, index, EXPERTS)
        each = tokens.unsqueeze(1).expand(-1, TOP, -1)
        inner = self.between(linear(each, index, self.up, self.up_bias), self)
        out = linear(inner, index, self.down)
        return (out * weights.unsqueeze(-1)).sum(1).view(x.shape)


def gated(x: Tensor, _: nn.Module) -> Tensor:
    return F.silu(x) * x.clamp(max=1.5)


def halves(x: Tensor, _: nn.Module) -> Tensor:
    """The same features from two slices."""
    a, b = x.chunk(2, -1)
    return torch.cat([b * F.gelu(a), a], -1)


def normed(x: Tensor, module: nn.Module) -> Tensor:
    return F.rms_norm(x, (INNER,), module.scale)


def scaled(x: Tensor, module: nn.Module) -> Tensor:
    return x * module.scale + F.softmax(x, -1)


def of_token(x: Tensor, _: nn.Module) -> Tensor:
    """One value for all choices of a token."""
    return x * torch.arange(1, INNER + 1)


def across_choices(x: Tensor, _: nn.Module) -> Tensor:
    """A row that depends on the other choice of its token."""
    return x - x.mean(1, keepdim=True)


def other_order(x: Tensor, _: nn.Module) -> Tensor:
    return x.flip(1)


def seen_otherwise(x: Tensor, _: nn.Module) -> Tensor:
    return x.reshape(-1, TOP, 2, INNER // 2).sum(2).repeat(1, 1, 2)


SORTED = [gated, halves, normed, scaled, of_token]
LEFT = [across_choices, other_order, seen_otherwise]


def ops_of(parallel: object, rank: int = 1) -> Counter[str]:
    graph = parallel.rank(rank).graph  # type: ignore[attr-defined]
    return Counter(str(node.target).split(".")[1] for node in graph.nodes
                   if str(node.target).startswith("ringcompile."))


@pytest.mark.parametrize("skip", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("between", [*SORTED, *LEFT], ids=lambda f: f.__name__)
def test_numbers_and_how_often_rows_are_sorted(
    between: Callable[[Tensor, nn.Module], Tensor], skip: bool
) -> None:
    module = Mixture(between, skip).eval()
    parallel = compiled(module, (torch.randn(1, 12, SIZE),), "ring=3")
    found = ops_of(parallel)
    expected = {"sort_rows": 1, "grouped_linear": 2} if between in SORTED else {"expert_linear": 2}
    names = ("sort_rows", "grouped_linear", "expert_linear")
    assert {name: found[name] for name in names if found[name]} == expected
    for length in (13, 5):
        x = torch.randn(1, length, SIZE)
        with torch.no_grad():
            assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


@pytest.mark.parametrize("spec", ["tp=2", "dp=2", "ring=2,tp=2", "ep=2"])
def test_numbers_on_other_meshes(spec: str) -> None:
    module = Mixture(gated, skip=True).eval()
    x = torch.randn(2, 12, SIZE)
    parallel = compiled(module, (x,), spec)
    assert ops_of(parallel, 0)["grouped_linear"] == 2
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


def test_tokens_are_read_where_they_are() -> None:
    """No row is written for a choice of a token before it is multiplied."""
    module = Mixture(gated).eval()
    graph = compiled(module, (torch.randn(1, 12, SIZE),), "ring=3").rank(1).graph
    (first, _) = [n for n in graph.nodes if n.target is op("grouped_linear")]
    taken = first.args[0]
    assert taken.target is torch.ops.aten.index.Tensor
    (index,) = taken.args[1]
    assert index.target is torch.ops.aten.floor_divide.Scalar
    assert index.args[1] == TOP
    assert taken.args[0].meta["type"].shape[1:] == (1, SIZE)
    assert not any(n.target is torch.ops.aten.expand.default for n in graph.nodes)


def test_rows_without_an_expert_are_not_what_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the last end a GPU writes nothing: what is there must not come back."""
    module = Mixture(gated, skip=True).eval()
    x = torch.randn(1, 12, SIZE)
    parallel = compiled(module, (x,), "ring=3")
    written = experts._one_by_one

    def dirty(rows: Tensor, ends: Tensor, *others: Tensor) -> Tensor:
        out = written(rows, ends, *others)
        out[int(ends[-1]):] = torch.nan
        return out

    with torch.no_grad():
        expected = module(x)
        monkeypatch.setattr(experts, "_one_by_one", dirty)
        assert difference(run(parallel, (x,)).outputs, expected) <= TOLERANCE


def test_without_rows_of_experts_nothing_changes() -> None:
    module = nn.Linear(SIZE, SIZE)
    graph = compiled(module, (torch.randn(1, 12, SIZE),), "ring=3").rank(0).graph
    assert not any("sort_rows" in str(node.target) for node in graph.nodes)
