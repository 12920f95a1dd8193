"""Convolutions and shifts on each rank's own tokens and a few of its neighbours'.

    x                [s/ring]      x = halo(x, before=3)   [n + 3]   three tokens from the rank before
    p = pad(x, (3, 0))   [s + 3]   p = x, zero in front of token 0
    y = conv1d(p, w)     [s]       y = trim(conv1d(p, w))  [s/ring]

What lies between tokens and an entry for each token again is written late: once it is known that
it ends so. Until then nothing is lost, since ordinary rules can still compute it from all tokens.
Which entry belongs to which token is what `shift_forms` says. All values between have windows of
the same tokens: of each chunk, with `before` tokens in front of it and `after` behind it. At the
edge of a window an op may see what it should not; such entries are trimmed off in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call, operands, replace_operands, with_argument
from ringcompile.ir.expr import equal, is_symbolic, simplify, spelled
from ringcompile.ir.layout import Atom, DimLayout, Layout
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder
from ringcompile.passes.requests import origin_of
from ringcompile.passes.shift_forms import Form, UnknownError, form_of, front_of, joined, pads_of
from ringcompile.passes.shift_region import MOVES, joined_along

aten = torch.ops.aten
HALO, TRIM = op("halo"), op("trim")
_Reach = tuple[int, int]  # tokens before the chunk and behind it; negative: less than the chunk


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
    """

    builder: Builder
    sequence: SequenceSplit
    value: Callable[[fx.Node], fx.Node]
    request: Callable[[fx.Node, Layout], fx.Node]
    single: frozenset[str]
    pending: dict[fx.Node, Form] = field(default_factory=dict)
    forms: dict[fx.Node, Form] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = tuple(name for name in self.sequence.names if name != "tp")
        self.rows: DimLayout = (Atom(self.sequence.length, names, sequence=True),) if names else ()
        self.level = self.sequence.level(names)
        self.positions: dict[_Reach, fx.Node] = {}

    def takes(self, node: fx.Node) -> bool:
        """Whether a call is one of those written here; it is written, or kept for later."""
        form = self._form(node)
        if form is None:
            return False
        self.forms[node] = form
        if form.extra == 0:
            self.builder.env[node] = _Region(self, node).write()
        else:
            self.pending[node] = form
        return True

    def _form(self, node: fx.Node) -> Form | None:
        """How a result stands to tokens; None of what ordinary rules are for."""
        begins = str(node.target) in (*MOVES, "aten.cat.default")
        continues = any(n in self.pending for n in operands(node))
        if not self.rows or not (begins or continues) or origin_of(node) in self.single:
            return None
        if not isinstance(node.meta.get("type"), TensorType):
            return None
        entering = {n: self._entering(n) for n in operands(node) if n not in self.pending}
        forms = self.pending | {n: form for n, form in entering.items() if form is not None}
        others = [n for n, form in entering.items() if form is None]
        if not all(layout_of(self.value(n)).is_whole for n in others if _is_tensor(n)):
            return None
        if not any(n in forms and self._is_split(n) for n in operands(node)):
            return None
        try:
            form = form_of(node, forms, self.sequence.length)
        except UnknownError:
            return None
        self.forms |= {n: forms[n] for n in entering if n in forms}
        source = self.source(node, forms)
        moves = source is not None and (form != replace(forms[source], dim=form.dim))
        return form if continues or moves else None

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
        if str(node.target) in MOVES:
            return operands(node)[0]
        return joined_along(node, forms) if node in forms else _joined(node, forms)


class _Region:
    """Writes a value with an entry for each token, and all that lies between tokens and it."""

    def __init__(self, windows: Windows, last: fx.Node) -> None:
        self.windows, self.builder, self.last = windows, windows.builder, last
        self.forms, self.level = windows.forms, windows.level
        self.nodes = [node for node in _between(last, windows.pending)]
        self.reach = self._reaches()
        self.before = max(0, *(before for before, _ in self.reach.values()))
        self.after = max(0, *(after for _, after in self.reach.values()))
        self.made: dict[fx.Node, fx.Node] = {}

    def write(self) -> fx.Node:
        """The last value, laid out as the sequence is."""
        for node in self.nodes:
            self.builder.at(node)
            writer = _WRITERS.get(str(node.target), _Region._same)
            self.made[node] = writer(self, node)
        self.builder.at(self.last)
        form, x = self.forms[self.last], self.made[self.last]
        type_ = type_of(self.last)
        out = self.builder.call(
            TRIM, (x,),
            type_.with_layout(Layout.whole(len(type_.shape)).with_dim(form.dim, self.windows.rows)),
            name=self.last.name, dim=form.dim, before=self.before - form.offset,
            after=self.after + form.offset, chunks=self.level.chunks_per_rank,
        )
        out.meta["origin"] = origin_of(self.last)
        return out

    def _reaches(self) -> dict[fx.Node, _Reach]:
        """Which tokens around its chunk a rank needs of each value between, and of the first."""
        offset = self.forms[self.last].offset
        reach: dict[fx.Node, _Reach] = {self.last: (offset, -offset)}
        for node in reversed(self.nodes):
            before, after = reach[node]
            for operand in operands(node):
                if operand not in self.forms:
                    continue
                late = self._late(node, operand)
                have = reach.get(operand, (before, after))
                wide = before + late + self.forms[node].reach
                reach[operand] = max(have[0], wide), max(have[1], after - late)
        return reach

    def _late(self, node: fx.Node, operand: fx.Node) -> int:
        """By how many tokens a result is ahead of an operand, entry by entry."""
        if self.windows.source(node, self.forms) is not None:
            return 0
        return self.forms[operand].offset - self.forms[node].offset

    # -- windows -------------------------------------------------------------------------------

    def _type(self, node: fx.Node) -> TensorType:
        """The type of a value's windows, one behind the other."""
        type_, dim = type_of(node), self.forms[node].dim
        shape = (*type_.shape[:dim], self._size, *type_.shape[dim + 1 :])
        return TensorType.whole(type_.dtype, shape)

    @property
    def _size(self) -> Any:
        each = self.level.chunk + self.before + self.after
        return simplify(each * self.level.chunks_per_rank)

    def _given(self, node: fx.Node, late: int = 0) -> fx.Node:
        """What stands for an operand: its windows, moved on by some tokens, or itself."""
        if node not in self.forms:
            x = self.windows.value(node)
            return self.windows.request(x, Layout.whole(len(type_of(x).shape)))
        if node not in self.made:
            self.made[node] = self._entered(node)
        return self._moved(self.made[node], self.forms[node].dim, late)

    def _entered(self, node: fx.Node) -> fx.Node:
        """A value with an entry for each token, and of its neighbours' what is needed."""
        x, dim = self.windows.value(node), self.forms[node].dim
        if str(node.target) == "aten.full.default":
            return self.builder.call(
                node.target, (list(self._type(node).shape), *x.args[1:]), self._type(node),
                **dict(x.kwargs),
            )
        x = self.windows.request(x, Layout.whole(len(type_of(x).shape)).with_dim(
            dim, self.windows.rows
        ))
        return self.builder.call(
            HALO, (x,), self._type(node), why="tokens of the neighbours", dim=dim,
            before=self.before, after=self.after, axis=self.level.axis,
        )

    def _moved(self, x: fx.Node, dim: int, late: int) -> fx.Node:
        return self._padded(x, dim, late, -late) if late else x

    def _padded(self, x: fx.Node, dim: int, left: int, right: int) -> fx.Node:
        """So many entries more in front and behind; what they hold is not used."""
        type_ = type_of(x)
        pads = [0, 0] * (len(type_.shape) - dim - 1) + [left, right]
        size = simplify(type_.shape[dim] + left + right)
        made = replace(type_, shape=(*type_.shape[:dim], size, *type_.shape[dim + 1 :]))
        return self.builder.call(aten.constant_pad_nd.default, (x, pads, 0), made)

    def _places(self) -> fx.Node:
        """The position of each entry of the windows; negative in front of token 0."""
        key = self.before, self.after
        known = self.windows.positions
        if key not in known:
            known[key] = self.builder.call(
                op("window_positions"), (list(self.level.own_chunks()),),
                TensorType.whole(torch.int64, (self._size,)), chunk=self.level.chunk,
                before=self.before, after=self.after, why="positions of this rank's windows",
            )
        return known[key]

    def _outside(self, node: fx.Node, name: str, bound: Any) -> fx.Node:
        """Bool [window, 1, ...]: whether a token lies before a bound (lt), or not (ge)."""
        places = self._places()
        target = {"lt": aten.lt.Scalar, "ge": aten.ge.Scalar}[name]
        flags = self.builder.call(
            target, (places, bound), TensorType.whole(torch.bool, type_of(places).shape)
        )
        behind = len(type_of(node).shape) - self.forms[node].dim - 1
        shape = (self._size, *(1,) * behind)
        return self.builder.call(
            aten.reshape.default, (flags, spelled(shape)), TensorType.whole(torch.bool, shape)
        )

    def _ends(self, node: fx.Node) -> tuple[int, Any]:
        """The tokens that a value's first entry belongs to, and its first behind the last."""
        form = self.forms[node]
        return -form.offset, simplify(self.windows.sequence.length + form.extra - form.offset)

    def _filled(self, node: fx.Node, left: bool, right: bool, value: float) -> fx.Node:
        """A value's windows with a number in front of its first entry, or behind its last."""
        x, (first, end) = self._given(node), self._ends(node)
        for wanted, name, bound in ((left, "lt", first), (right, "ge", end)):
            if wanted:
                x = self.builder.call(
                    aten.masked_fill.Scalar, (x, self._outside(node, name, bound), value),
                    type_of(x), why="what the model has around the sequence",
                )
        return x

    # -- ops -----------------------------------------------------------------------------------

    def _again(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> fx.Node:
        rule = find_rule(node.target)
        if rule is not None and rule.shape_argument is not None:
            args, kwargs = with_argument(
                node, args, kwargs, rule.shape_argument, spelled(self._type(node).shape)
            )
        new = self.builder.call(
            node.target, args, self._type(node), why=node.meta.get("why"), **kwargs
        )
        new.meta["origin"] = origin_of(node)
        return new

    def _same(self, node: fx.Node) -> fx.Node:
        """The same op on windows; entries that do not belong to one token are moved."""
        given = [
            self._given(n, self._late(node, n) if n in self.forms else 0) for n in operands(node)
        ]
        args, kwargs = replace_operands(node, given)
        return self._again(node, args, dict(kwargs))

    def _slice(self, node: fx.Node) -> fx.Node:
        """Along the tokens a slice only says which entry is whose."""
        if Call(node)["dim"] % len(type_of(node).shape) != self.forms[node].dim:
            return self._same(node)
        return self._given(operands(node)[0])

    def _pad(self, node: fx.Node) -> fx.Node:
        """Along the tokens, what is in front of token 0 and behind the last."""
        (source,) = operands(node)
        call, dim = Call(node), self.forms[node].dim
        left, right = pads_of(node, dim)
        x = self._filled(source, left > 0, right > 0, call["value"] or 0)
        pads, place = list(call["pad"]), 2 * (len(type_of(node).shape) - 1 - dim)
        pads[place : place + 2] = [0, 0][: len(pads[place : place + 2])]
        if not any(pads):
            return x
        args, kwargs = with_argument(node, (x, *node.args[1:]), dict(node.kwargs), "pad", pads)
        return self._again(node, args, kwargs)

    def _convolution(self, node: fx.Node) -> fx.Node:
        call, form, (source, *others) = Call(node), self.forms[node], operands(node)
        spatial = len(type_of(call["weight"]).shape) - 2
        i = form.dim - len(type_of(node).shape) + spatial
        if i < 0:
            return self._same(node)
        pads = list(call["padding"])
        pads = pads * spatial if len(pads) == 1 else pads
        x = self._filled(source, pads[i] > 0, pads[i] > 0, 0)
        x = self._padded(x, form.dim, form.reach, 0)
        args, kwargs = replace_operands(node, [x, *map(self._given, others)])
        kept = [0 if place == i else pad for place, pad in enumerate(pads)]
        return self._again(node, *with_argument(node, args, dict(kwargs), "padding", kept))

    def _unfold(self, node: fx.Node) -> fx.Node:
        (source,), form = operands(node), self.forms[node]
        x = self._padded(self._given(source), form.dim, form.reach, 0)
        return self._again(node, (x, *node.args[1:]), dict(node.kwargs))

    def _cat(self, node: fx.Node) -> fx.Node:
        """Entries in front of token 0, or behind the last, that are a tensor of their own."""
        around = joined(node, self.forms)
        if around is None:
            return self._same(node)
        source, left, right = around
        parts = list(Call(node)["tensors"])
        at = parts.index(source)
        return self._around(source, parts[:at], left, parts[at + 1 :], right)

    def _around(
        self, source: fx.Node, front: Sequence[fx.Node], left: int, back: Sequence[fx.Node],
        right: int,
    ) -> fx.Node:
        """A value's windows with tensors in front of its first entry and behind its last."""
        x, (first, end) = self._given(source), self._ends(source)
        for parts, size, name, bound, start in (
            (front, left, "lt", first, first - left), (back, right, "ge", end, end)
        ):
            if size:
                chosen = self._chosen(source, parts, size, start)
                x = self.builder.call(
                    aten.where.self, (self._outside(source, name, bound), chosen, x), type_of(x)
                )
        return x

    def _chosen(
        self, source: fx.Node, parts: Sequence[fx.Node], size: int, start: Any
    ) -> fx.Node:
        """For each entry of the windows that of tensors whose first belongs to token `start`."""
        dim, given = self.forms[source].dim, [self._given(part) for part in parts]
        type_, places = type_of(given[0]), self._places()
        shape = (*type_.shape[:dim], size, *type_.shape[dim + 1 :])
        whole = given[0] if len(given) == 1 else self.builder.call(
            aten.cat.default, (given, dim), replace(type_, shape=shape)
        )
        index = self.builder.call(aten.sub.Scalar, (places, start), type_of(places))
        index = self.builder.call(aten.clamp.default, (index, 0, size - 1), type_of(places))
        wide = replace(type_, shape=(*type_.shape[:dim], self._size, *type_.shape[dim + 1 :]))
        return self.builder.call(aten.index_select.default, (whole, dim, index), wide)

    def _differences(self, node: fx.Node) -> fx.Node:
        call, form, source = Call(node), self.forms[node], operands(node)[0]
        front = [] if call["prepend"] is None else [call["prepend"]]
        left = front_of(node, form.dim)
        x = self._padded(self._around(source, front, left, [], 0), form.dim, 1, 0)
        return self._again(node, (x, 1, call["dim"]), {})


def _between(last: fx.Node, pending: dict[fx.Node, Form]) -> list[fx.Node]:
    """The values between tokens and the last one, it included, in order."""
    found, work = {last}, [last]
    while work:
        for operand in operands(work.pop()):
            if operand in pending and operand not in found:
                found.add(operand)
                work.append(operand)
    return [node for node in (*pending, last) if node in found]


def _joined(node: fx.Node, forms: dict[fx.Node, Form]) -> fx.Node | None:
    if str(node.target) != "aten.cat.default":
        return None
    around = joined(node, forms)
    return None if around is None else around[0]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("type"), TensorType)


_WRITERS: dict[str, Callable[[_Region, fx.Node], fx.Node]] = {
    "aten.constant_pad_nd.default": _Region._pad,
    "aten.pad.default": _Region._pad,
    "aten.slice.Tensor": _Region._slice,
    "aten.conv1d.default": _Region._convolution,
    "aten.conv2d.default": _Region._convolution,
    "aten.unfold.default": _Region._unfold,
    "aten.cat.default": _Region._cat,
    "aten.diff.default": _Region._differences,
}


def with_one_halo(program: Program) -> Program:
    """The program with one halo for each value, from which narrower windows are cut.

    A chunk is padded to as many tokens as its neighbours take of it.
    """
    assert program.sequence is not None
    wide: dict[tuple[fx.Node, int], _Reach] = {}
    for node in program.graph.nodes:
        if node.target is HALO:
            call = Call(node)
            key, (before, after) = (call["x"], call["dim"]), wide.get((call["x"], call["dim"]), (0, 0))
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
    wide: dict[tuple[fx.Node, int], _Reach],
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
