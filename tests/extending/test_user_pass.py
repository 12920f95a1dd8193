"""What a user's own pass does wrong is one error that names it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.passes.base import Builder, Pass

HINT = (
    "see 'A rewrite of your own' in docs/extending.md; `Builder` copies nodes with their types "
    "and lines"
)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask) * 2


@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "mine"
    does: Callable[[Program], Any]

    def run(self, program: Program) -> Program:
        made: Program = self.does(program)
        return made


def _captured() -> Program:
    x, mask = torch.randn(2, 12, 16), torch.rand(2, 1, 12, 12) < 0.5
    return rc.capture(Attention(), (x, mask))


def _copied(program: Program, change: Callable[[Any, Any], Any]) -> Program:
    builder = Builder()
    for node in program.graph.nodes:
        builder.env[node] = new = builder.copy(node)
        change(node, new)
    return program.with_graph(builder.graph)


def _raise(program: Program) -> Any:
    raise KeyError("x")


def _in_place(program: Program) -> Program:
    last = [node for node in program.graph.nodes if node.op == "call_function"][-1]
    last.args = (last.args[0], 3)
    return program


def _without_type(program: Program) -> Program:
    return _copied(program, lambda old, new: new.meta.pop("type", None))


def _without_mask(program: Program) -> Program:
    def drop(old: Any, new: Any) -> None:
        if str(old.target) == "ringcompile.attention.default":
            new.args = tuple(None if a is not None and "mask" in str(a) else a for a in new.args)
            new.kwargs = {k: None if "mask" in k else v for k, v in new.kwargs.items()}

    return _copied(program, drop)


WRONG: dict[str, tuple[Callable[[Program], Any], str]] = {
    "raises": (_raise, "the pass 'mine' failed: KeyError: 'x'"),
    "returns a graph": (lambda p: p.graph, "the pass 'mine' returned Graph, not a Program"),
    "returns nothing": (lambda p: None, "the pass 'mine' returned NoneType, not a Program"),
    "changes what it is given": (
        _in_place,
        "the pass 'mine' changed the program that it was given; it has to return a new one",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused_by_name(name: str) -> None:
    does, text = WRONG[name]
    with pytest.raises(RingCompileError) as caught:
        rc.transform(_captured(), "ring=2", passes=[Mine(does)])
    assert (caught.value.message, caught.value.hint) == (text, HINT)


@pytest.mark.parametrize(
    ("does", "part"),
    [(_without_type, "has no type"), (_without_mask, "has lost its ")],
)
def test_an_invalid_program_is_refused(does: Callable[[Program], Any], part: str) -> None:
    with pytest.raises(RingCompileError, match=part) as caught:
        rc.transform(_captured(), "ring=2", passes=[Mine(does)])
    assert caught.value.message.startswith("the pass 'mine' left an invalid program: ")


def test_something_else_is_no_pass() -> None:
    with pytest.raises(RingCompileError) as caught:
        rc.transform(_captured(), "ring=2", passes=["clean-up"])  # type: ignore[list-item]
    assert caught.value.message == "passes= takes instances of Pass, not 'clean-up'"


def test_an_error_of_ours_stays_as_it_is() -> None:
    def refuse(program: Program) -> Any:
        raise RingCompileError("no gelu here", hint="use another model")

    with pytest.raises(RingCompileError) as caught:
        rc.transform(_captured(), "ring=2", passes=[Mine(refuse)])
    assert caught.value.message == "no gelu here"
