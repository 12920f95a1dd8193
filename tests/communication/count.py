"""Formulas, graphs and runs, side by side."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import BATCH, FIRST, LOCAL, PART, SEQUENCE, bind, symbol
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.ops.experts import expert_linear
from ringcompile.ops.schemas import op
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.session import Session
from tests.communication.rows import LEGEND, Row
from tests.support import zoo_program

LENGTH = 48  # divides over all ranks and chunks of the rows
PLACES = {"R": "ring", "U": "ulysses", "T": "tp", "P": "pp", "N": "ep", "M": "time",
          "W": "tile"}
SYMBOLS = {name: sympy.Symbol(name, integer=True, positive=True) for name in LEGEND}
SYMBOLS |= {name: symbol(name) for name in ("s", "n")}
SYMBOLS |= {name: sympy.Symbol(name, integer=True, nonnegative=True) for name in ("r", "p", "q")}
_SHORT = {
    "K": "2*L*B*n*G*d*b",
    "X": "B*n*D*b",
}


class Window(nn.Module):
    """One attention of 3 heads x 4, over the last `width` tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(*x.shape[:2], 3, 4).transpose(1, 2)
        at = torch.arange(x.shape[1])
        back = at[:, None] - at
        seen = (back >= 0) & (back < self.width)
        out = F.scaled_dot_product_attention(heads, heads + 1, heads * 2, attn_mask=seen)
        return out.transpose(1, 2).reshape(x.shape)


class Convolution(nn.Module):
    """Each channel of 12 by itself, over the last `width` tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 12, width, groups=12, padding=width - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Recurrence(nn.Module):
    """h = a h + x for each of `width` channels, with a decay `a` that tokens choose."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decay = (torch.sigmoid(self.decay(x)) + 1).cumprod(1)
        return decay * (x / decay).cumsum(1)


class StateSpace(nn.Module):
    """h = a h + b x for `width` states of each of 12 channels, with `a` and `b` from tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay, self.enter = nn.Linear(12, width), nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        terms = self.enter(x)[..., None, :] * x[..., None]
        factors = self.decay(x).sigmoid()[..., None, :].expand_as(terms)
        scanned = associative_scan(_then, (factors, terms), 1, combine_mode="generic")
        return scanned[1].sum(-1)


class Experts(nn.Module):
    """Attention of 3 heads x 4, and two of `width` experts of 24 features for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.out, self.router = (nn.Linear(12, n) for n in (36, 12, width))
        self.up, self.down = (nn.Parameter(torch.randn(width, *of)) for of in ((12, 24), (24, 12)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (3, 4)).transpose(1, 2) for y in self.heads(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        weight, index = self.router(x).softmax(-1).topk(2, -1)
        rows = x.unsqueeze(2).expand(*index.shape, x.shape[-1])
        chosen = _through(_through(rows, index, self.up).relu(), index, self.down)
        return x + (chosen * weight[..., None]).sum(2)


def _through(*args: torch.Tensor) -> torch.Tensor:
    run = op("expert_linear") if torch.compiler.is_exporting() else expert_linear
    return run(*args, transposed=True)


def _then(left: Any, right: Any) -> Any:
    return left[0] * right[0], right[0] * left[1] + right[1]


OWN = {"window": Window, "convolution": Convolution, "recurrence": Recurrence,
       "state-space": StateSpace, "experts": Experts}


def width_of(model: str) -> int | None:
    """The width of `window of 8`; None for a model of the zoo."""
    return int(model.rpartition(" ")[2]) if model.split()[0] in OWN else None


@cache
def captured(model: str) -> Program:
    width = width_of(model)
    if width is not None:
        return capture(OWN[model.split()[0]](width), (torch.randn(1, 24, 12),))
    return zoo_program(model, sequence=24)


def inputs(model: str, length: int) -> tuple[torch.Tensor, ...]:
    if width_of(model) is not None:
        return (torch.randn(1, length, 12),)
    return zoo.build(model, sequence=length)[1]


def sizes(model: str) -> dict[str, Any]:
    """The numbers of a model, by symbol."""
    if width_of(model) is not None:
        return {"B": 1, "L": 1, "D": 12, "H": 3, "G": 3, "d": 4, "b": 4}
    config = zoo.entry(model).config
    return {
        "B": 1, "L": config.num_layers, "D": config.hidden_size, "H": config.num_heads,
        "G": config.num_kv_heads, "d": config.head_dim, "b": getattr(torch, config.dtype).itemsize,
        "E": config.num_experts or 1, "k": config.top_k,
        "f": sympy.Rational(config.capacity_factor or 0),
    }


@cache
def compiled(row: Row) -> ParallelProgram:
    made = transform(captured(row.model), row.parallel, **row.options)
    return made.with_cache() if "cache" in row.options else made


def expected(row: Row, rank: int) -> Any:
    """The formula for a rank, in `s` and `n` alone."""
    parallel = compiled(row)
    sequence = parallel.program.sequence
    assert sequence is not None
    at = parallel.mesh.coordinates(rank)
    known: dict[str, Any] = {
        **sizes(row.model),
        **{name: parallel.mesh.size(axis) for name, axis in PLACES.items()},
        "r": at.get("ring", 0), "p": at.get("pp", 0), "q": at.get("ulysses", 0),
        "c": sequence.chunks_per_rank,
    }
    width = width_of(row.model)
    if width is not None:
        known["w"] = known["z"] = width
    if width is not None and "length" in row.options:
        known["h"] = -(-(width - 1) // sequence.local_length(row.options["length"]))
    values = {SYMBOLS[name]: value for name, value in known.items()}

    def read(text: str) -> Any:
        opened = sympy.sympify(text, locals=SYMBOLS)
        short = {SYMBOLS[name]: sympy.sympify(t, locals=SYMBOLS) for name, t in _SHORT.items()}
        return opened.subs(short).subs(values)

    return next(read(formula) for formula, when in row.terms if not when or bool(read(when)))


def counted(row: Row, rank: int) -> Any:
    """The bytes of a rank's graph for one sequence, in `s` and `n`; n is s where none is split."""
    parallel = compiled(row)
    one = {BATCH: 1, PART: 1, FIRST: 0}
    found = sympy.sympify(bind(bytes_sent(parallel.rank(rank)), one))
    sequence = parallel.program.sequence
    assert sequence is not None
    return found if sequence.axes else found.subs(symbol(SEQUENCE), symbol(LOCAL))


def numbers(row: Row, length: int) -> list[int]:
    """The formula's bytes of every rank, for a length."""
    parallel = compiled(row)
    assert parallel.program.sequence is not None
    lengths = parallel.program.sequence.bindings({"s": length})
    return [int(bind(expected(row, rank), lengths)) for rank in range(parallel.world_size)]


def ran(row: Row, length: int) -> list[int]:
    """The bytes that every rank of a lock-step run sends."""
    if "cache" in row.options:
        made = transform(captured(row.model), row.parallel, **row.options)
        with Session(made) as opened:
            opened.extend(inputs(row.model, length))
            return opened.driver.bytes_sent
    parallel = compiled(row)
    given = tuple(
        x.repeat(parallel.mesh.size("dp"), *[1] * (x.dim() - 1))
        for x in inputs(row.model, length)
    )
    return run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, given).bytes_sent
