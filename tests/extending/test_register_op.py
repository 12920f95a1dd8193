"""An operator of a user's own: in a model, split, saved and costed; refused where its dims lie."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringcompile as rc
from ringcompile.cost.ops import has_cost
from ringcompile.ir.rules import RULES

NUMBERS = itertools.count()


@pytest.fixture
def name() -> Iterator[str]:
    """A name that no other test has; torch keeps operators for ever, the rule table need not."""
    before = set(RULES)
    yield f"ourtests::op{next(NUMBERS)}"
    for target in set(RULES) - before:
        del RULES[target]


def scaled(x: Tensor, by: Tensor, power: int) -> Tensor:
    return x.tanh() * by**power


class Scaled(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.embedding = op, nn.Embedding(32, 16)
        self.qkv, self.by = nn.Linear(16, 48), nn.Parameter(torch.linspace(0.5, 2, 16))
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.wide = nn.Parameter(torch.linspace(0.5, 2, 64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.op(self.embedding(tokens), self.by, 2)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2)
        return x + self.down(self.op(self.up(x), self.wide, 3))


EXAMPLE = (torch.randn(2, 6, 8), torch.rand(8) + 0.5, 2)


def test_it_is_split_saved_and_costed(name: str, tmp_path: Path) -> None:
    op = rc.register_op(name, scaled, dims="... d, d -> ... d", example=EXAMPLE, cost="special")
    model = Scaled(op).eval()
    tokens = torch.arange(22).reshape(1, 22) % 32
    program = rc.capture(model, (tokens,))
    want = model(tokens)
    for spec in ("ring=2", "tp=2", "ring=2,tp=2"):
        parallel = rc.transform(program, spec)
        torch.testing.assert_close(rc.run(parallel, (tokens,)), want, rtol=1e-5, atol=1e-5)
        assert "gather" not in str(parallel.rank(0)).replace("// all-gather", "")
    parallel.save(tmp_path / "out")
    torch.testing.assert_close(rc.run(rc.load(tmp_path / "out"), (tokens,)), want)
    assert has_cost(op)


def test_a_strangers_artifact_is_refused_without_the_op(name: str, tmp_path: Path) -> None:
    op = rc.register_op(name, scaled, dims="... d, d -> ... d", example=EXAMPLE)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    rc.transform(rc.capture(Scaled(op).eval(), (tokens,)), "ring=2").save(tmp_path / "out")
    del RULES[str(op)]
    with pytest.raises(rc.RingCompileError, match="op"):
        rc.run(rc.load(tmp_path / "out"), (tokens,))


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def test_dims_that_are_not_true_are_refused(name: str) -> None:
    x = torch.randn(2, 6, 8)
    with pytest.raises(rc.RingCompileError, match="run on a part of dim 'd', does not give"):
        rc.register_op(name, centred, dims="... d -> ... d", example=(x,))
    assert not any(name.replace("::", ".") in rule for rule in RULES)


def test_dims_that_have_to_be_whole(name: str) -> None:
    op = rc.register_op(
        name, centred, dims="... d -> ... d", whole="d", example=(torch.randn(2, 6, 8),),
        cost="reduction",
    )
    names = RULES[str(op)].factors  # type: ignore[attr-defined]
    assert callable(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": "... d, d"}, "cannot read the dims"),
        ({"dims": "... d, 2 -> ... d"}, "cannot read the dims"),
        ({"dims": "... d, d -> ... d", "whole": "z"}, "'z' is named in `whole`"),
        ({"dims": "... d -> ... d"}, "the example has 2 tensors, the dims name 1"),
        ({"dims": "a d, d -> a d"}, "the dims do not fit the example"),
        ({"cost": "free"}, "unknown cost 'free'"),
        ({"body": centred, "dims": "... d -> ... d", "example": (torch.randn(4, 1),)},
         "the example has 1 entries along dim 'd', too few to check the dims"),
        ({"body": lambda x: x, "dims": "... d -> ... d", "example": (torch.randn(4, 2),)},
         "cannot be an operator: .* annotation"),
        ({"body": None}, "needs a namespace and a body"),
    ],
)
def test_what_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"body": scaled, "dims": "... d, d -> ... d", "example": EXAMPLE}
    with pytest.raises(rc.RingCompileError, match=message):
        rc.register_op(name, **(given | change))


def test_a_name_that_is_taken(name: str) -> None:
    op = rc.register_op(name, scaled, dims="... d, d -> ... d", example=EXAMPLE)
    with pytest.raises(rc.RingCompileError, match="already has a rule"):
        rc.register_op(op, dims="... d, d -> ... d", example=EXAMPLE)
