"""One function as a module on one plan: right, refused, wrong, or a crash."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from tests.own_modules.attentions import ATTENTIONS, Item
from tests.own_modules.ops import OPS
from tests.support import difference, run

AXES = ("ring=4", "ulysses=2", "tp=2", "pp=2", "dp=2", "ring=2,tp=2", "time=2")
# 24 divides over all axes, and is what is captured; 27 divides over none.
LENGTHS = (24, 27)
CAPTURED, EXACT = 24, 1e-10
RIGHT, REFUSED, WRONG, CRASHED = "right", "refused", "wrong", "crashed"


class Odd(nn.Module):
    """One item over hidden states [B, S, 16], in float64.

    Args:
        item: what it computes.
        behind_attention: of the result of an attention, of hidden states otherwise.
    """

    def __init__(self, item: Item, behind_attention: bool) -> None:
        super().__init__()
        self.item, self.behind_attention = item, behind_attention
        self.up, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.gate = nn.Linear(16, 4)
        for name, shape in {
            "mix": (4, 4), "relative": (16, 4), "centres": (5, 16), "cube": (4, 16, 16)
        }.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        generator = torch.Generator().manual_seed(0)
        self.double().eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, 4, S, 4]."""
        return [t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.up(x).chunk(3, -1)]

    def merged(self, y: Tensor) -> Tensor:
        """[B, 4, S, 4] as hidden states."""
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Any:
        if self.behind_attention:
            q, k, v = self.heads(x)
            x = x + self.merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.item(self, x)


ITEMS: Mapping[str, tuple[str, Item]] = {
    **{f"attention: {name}": ("attention", item) for name, item in ATTENTIONS.items()},
    **{f"op: {name}": ("op", item) for name, item in OPS.items()},
}


@dataclass(frozen=True)
class Trial:
    """What became of an item on a plan; the text says why it is not right."""

    item: str
    spec: str
    outcome: str
    text: str = ""
    notes: tuple[str, ...] = ()


def module(name: str) -> Odd:
    """The module of an item."""
    kind, item = ITEMS[name]
    return Odd(item, behind_attention=kind == "op")


def hidden(length: int) -> Tensor:
    """Hidden states [2, length, 16]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, 16, generator=generator, dtype=torch.float64)


def trials(name: str, specs: tuple[str, ...] = AXES) -> Iterator[Trial]:
    """An item on each plan; it is captured once."""
    model = module(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = capture(model, (hidden(CAPTURED),))
    except RingCompileError as error:
        yield from (Trial(name, spec, REFUSED, _reason(error)) for spec in specs)
        return
    except Exception as error:
        yield from (Trial(name, spec, CRASHED, repr(error)[:200]) for spec in specs)
        return
    for spec in specs:
        yield _trial(name, model, program, spec)


def _trial(name: str, model: Odd, program: Program, spec: str) -> Trial:
    notes: tuple[str, ...] = ()
    try:
        parallel = transform(program, spec)
        notes = parallel.program.notes
        for length in LENGTHS:
            with torch.no_grad():
                expected = model(hidden(length))
                found = run(parallel, (hidden(length),)).outputs
            off = difference(found, expected)
            if not off <= EXACT:
                return Trial(name, spec, WRONG, f"{off:.2g} at {length} tokens", notes)
    except RingCompileError as error:
        return Trial(name, spec, REFUSED, _reason(error), notes)
    except Exception as error:
        return Trial(name, spec, CRASHED, f"{type(error).__name__}: {error}"[:200], notes)
    return Trial(name, spec, RIGHT, notes=notes)


def _reason(error: RingCompileError) -> str:
    """An error's message without the place, which is the item's own line."""
    return str(error).splitlines()[0].partition("error: ")[2]
