"""Convolutions and shifts on each rank's own tokens and a few of its neighbours'.

    x                [s/ring]      x = halo(x, before=3)   [n + 3]   with three of the rank before
    p = pad(x, (3, 0))   [s + 3]   p = x, zero in front of token 0
    y = conv1d(p, w)     [s]       y = trim(conv1d(p, w))  [s/ring]

What lies between tokens and an entry for each token again is written late: once it is known that
it ends so. Until then nothing is lost, since ordinary rules can still compute it from all tokens.
Which entry belongs to which token is what `shift_forms` says. All values between have windows of
the same tokens: of each chunk, with `before` tokens in front of it and `after` behind it. At the
edge of a window an op may see what it should not; such entries are trimmed off in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from ringcompile.ir.calls import Call, operands, target_name
from ringcompile.ir.expr import Size, equal, is_symbolic, simplify
from ringcompile.ir.layout import Atom, DimLayout, Layout
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder
from ringcompile.passes.requests import origin_of
from ringcompile.passes.windows.few_tokens import few_tokens
from ringcompile.passes.windows.ops import write, write_part
from ringcompile.passes.windows.region import HALO, TRIM, Reach, WindowRegion
from ringcompile.passes.windows.shift_forms import (
    MOVES,
    Form,
    UnknownError,
    beside,
    form_of,
    joined,
)
from ringcompile.passes.windows.shift_region import joined_along


@dataclass
class Windows:
    """Values of a program that are made of each token's neighbours.

    Attributes:
        builder: the graph that is written.
        sequence: how the sequence is divided.
        value: what stands for a node of the model in that graph.
        request: a value of that graph in another layout.
        single: names of values that are computed in one layout only.
        pending: how entries of values that are not written yet stand to tokens.
        forms: the same of all values that windows are made of.
        written: the windows of values, by how far they reach.
    """

    builder: Builder
    sequence: SequenceSplit
    value: Callable[[fx.Node], fx.Node]
    request: Callable[[fx.Node, Layout], fx.Node]
    single: frozenset[str]
    pending: dict[fx.Node, Form] = field(default_factory=dict)
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    written: dict[Reach, dict[fx.Node, fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = tuple(name for name in self.sequence.names if name != "tp")
        self.rows: DimLayout = (Atom(self.sequence.length, names, sequence=True),) if names else ()
        self.level = self.sequence.level(names)
        self.positions: dict[Reach, fx.Node] = {}

    def takes(self, node: fx.Node) -> bool:
        """Whether a call is one of those written here; it is written, or kept for later."""
        form = self._form(node)
        if form is None and (few := self._few(node)) is not None:
            self.builder.env[node] = few
            return True
        if form is None or (form.extra == 0 and not _has_features(node)):
            return False
        self.forms[node] = form
        if form.extra != 0:
            self.pending[node] = form
            return True
        region = WindowRegion(self, node)
        if not self._fits(region):
            return False
        self.builder.env[node] = write(region)
        return True

    def _few(self, node: fx.Node) -> fx.Node | None:
        """A few tokens that an op cuts out, on every rank; None of what is something else."""
        alone = self.rows and origin_of(node) not in self.single
        return few_tokens(self, node) if alone else None

    def places(self, reach: Reach, size: Size) -> fx.Node:
        """The position of each entry of windows of so many tokens; negative in front of token 0."""
        if reach not in self.positions:
            self.positions[reach] = self.builder.call(
                op("window_positions"), (list(self.level.own_chunks()),),
                TensorType.whole(torch.int64, (size,)), chunk=self.level.chunk,
                before=reach[0], after=reach[1], why="positions of this rank's windows",
            )
        return self.positions[reach]

    def whole(self, node: fx.Node) -> fx.Node | None:
        """A pending value of a run of the tokens, gathered; None where computing it is cheap."""
        if not self.pending[node].is_part:
            return None
        region = WindowRegion(self, node, stays=True)
        if region.before or region.after or not any(map(_is_product, region.nodes)):
            return None
        return write_part(region)

    def _fits(self, region: WindowRegion) -> bool:
        """Whether chunks of a length that is fixed are as long as what neighbours take of them."""
        if is_symbolic(self.sequence.length):
            return True
        chunk = self.level.local_length(self.sequence.length) // self.level.chunks_per_rank
        return max(region.before, region.after) <= chunk

    def _form(self, node: fx.Node) -> Form | None:
        """How a result stands to tokens; None of what ordinary rules are for."""
        begins = target_name(node.target) in (*MOVES, "aten.cat.default")
        continues = any(n in self.pending for n in operands(node))
        if not self.rows or not (begins or continues) or origin_of(node) in self.single:
            return None
        if not isinstance(node.meta.get("type"), TensorType):
            return None
        entering = {n: self._entering(n) for n in operands(node) if n not in self.pending}
        forms = self.pending | {n: form for n, form in entering.items() if form is not None}
        others = [n for n, form in entering.items() if form is None]
        entering |= self._beside(node, forms)
        forms |= {n: form for n, form in entering.items() if form is not None}
        if not all(layout_of(self.value(n)).is_whole for n in others if _is_tensor(n)):
            return None
        if not any(n in forms and self._is_split(n) for n in operands(node)):
            return None
        try:
            form = form_of(node, forms, self.sequence.length)
        except UnknownError:
            return None
        if _is_short(form, self.sequence.length):
            return None
        self.forms |= {n: forms[n] for n in entering if n in forms}
        source = self.source(node, forms)
        moves = source is not None and (form != replace(forms[source], dim=form.dim))
        return form if continues or moves else None

    def _beside(self, node: fx.Node, forms: dict[fx.Node, Form]) -> dict[fx.Node, Form | None]:
        """Operands that every rank has whole, of which each takes the entries of its own tokens."""
        return {
            n: form for n, form in beside(node, forms).items()
            if _is_tensor(n) and self.forms.get(n, form) == form
        }

    def _is_split(self, node: fx.Node) -> bool:
        return node in self.pending or not layout_of(self.value(node)).is_whole

    def _entering(self, node: fx.Node) -> Form | None:
        """Of a value with one entry a token, which is split or may be."""
        if not _is_tensor(node):
            return None
        type_ = type_of(node)
        split = [i for i, dim in enumerate(layout_of(self.value(node)).dims) if dim]
        if split:
            whole_rows = len(split) == 1 and layout_of(self.value(node)).dims[split[0]] == self.rows
            return Form(split[0]) if whole_rows else None
        long = [i for i, size in enumerate(type_.shape)
                if is_symbolic(size) and equal(size, self.sequence.length)]
        return Form(long[0]) if len(long) == 1 else None

    @staticmethod
    def source(node: fx.Node, forms: dict[fx.Node, Form]) -> fx.Node | None:
        """The operand whose entries an op moves; None where it keeps those of all operands."""
        if target_name(node.target) in MOVES:
            return operands(node)[0]
        return joined_along(node, forms) if node in forms else _joined(node, forms)


def _joined(node: fx.Node, forms: dict[fx.Node, Form]) -> fx.Node | None:
    if target_name(node.target) != "aten.cat.default":
        return None
    around = joined(node, forms)
    return None if around is None else around[0]


def _has_features(node: fx.Node) -> bool:
    """Whether a value is no id, count or flag, which every rank has whole where inputs tell it."""
    return type_of(node).dtype.is_floating_point or type_of(node).dtype.is_complex


def _is_product(node: fx.Node) -> bool:
    rule = find_rule(node.target)
    return isinstance(rule, FactorRule) and rule.sums


def _is_short(form: Form, length: Size) -> bool:
    """Whether a value has entries for so few of the tokens that others had better be left out."""
    return isinstance(length, int) and 2 * form.extra < -length


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("type"), TensorType)


def with_one_halo(program: Program) -> Program:
    """The program with one halo for each value, from which narrower windows are cut.

    A chunk is padded to as many tokens as its neighbours take of it.
    """
    assert program.sequence is not None
    wide: dict[tuple[fx.Node, int], Reach] = {}
    for node in program.graph.nodes:
        if node.target is HALO:
            call = Call(node)
            key = call["x"], call["dim"]
            before, after = wide.get(key, (0, 0))
            wide[key] = max(before, call["before"]), max(after, call["after"])
    if not wide:
        return program
    builder, made = Builder(), dict[tuple[fx.Node, int], fx.Node]()
    for node in program.graph.nodes:
        builder.at(node)
        builder.env[node] = (
            _narrowed(builder, node, wide, made, program.sequence)
            if node.target is HALO else builder.copy(node)
        )
    least = max(max(reach) for reach in wide.values())
    return program.with_graph(
        builder.graph, sequence=replace(program.sequence, least=max(least, 1))
    )


def _narrowed(
    builder: Builder,
    node: fx.Node,
    wide: dict[tuple[fx.Node, int], Reach],
    made: dict[tuple[fx.Node, int], fx.Node],
    sequence: SequenceSplit,
) -> fx.Node:
    call = Call(node)
    dim, key = call["dim"], (call["x"], call["dim"])
    level = sequence.level(tuple(call["axis"].split(",")))
    before, after = wide[key]
    if key not in made:
        type_ = type_of(node)
        size = simplify((level.chunk + before + after) * level.chunks_per_rank)
        made[key] = builder.call(
            HALO, (builder.env[call["x"]],),
            replace(type_, shape=(*type_.shape[:dim], size, *type_.shape[dim + 1 :])),
            name=node.name, why=node.meta.get("why"), dim=dim, before=before, after=after,
            axis=call["axis"],
        )
    left, right = before - call["before"], after - call["after"]
    if not left and not right:
        return made[key]
    return builder.call(
        TRIM, (made[key],), type_of(node), dim=dim, before=left, after=right,
        chunks=level.chunks_per_rank,
    )
