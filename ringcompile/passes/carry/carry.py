"""Time carried: one program for the next tokens of a sequence, whose earlier ones it remembers.

`time` is an axis without ranks. `unroll` writes its chunks out one behind the other, in one
program; here the program is written for one chunk, the new tokens of a call, and what it needs of
the chunks before it is state that a rank keeps between calls:

    p = arange(0, s)           [s/time]   ->  p = positions of the new tokens
    t = table[0:s]             [s]        ->  t = table[0:capacity]
    r = redistribute(t)        [s/time]   ->  r = index_select(t, 0, positions)
    o = attention(q, k, v)     k [s/time] ->  k, v = store(k), store(v);  o = cached_attention(q)
    y = cumsum(x, 1)           [s/time]   ->  y = running_sum(x, sums)
    h = recurrence(a, b)       [s/time]   ->  h = running_recurrence(a, b, kept)
    y = linear_attention(q, k, v, g)      ->  y = running_linear_attention(q, k, v, g, kept ..)
    y = conv1d(pad(x), w)      [s]        ->  y = conv1d(recent(x, kept), w)
    m = redistribute(x)        [s]            is refused: a token that comes later would change it

`place` has said which values are split along time, by the same requests that give a rank its share
of a sequence. What is split is computed for the new tokens. What is whole is made of positions and
of inputs that are token-sized, for as many positions as the cache has; `carried_dims` makes sure
that the entry of a position depends on no later one. Keys and values of a sequence lie on the ranks
of `ring` and `ulysses`, each position on one of them: every rank attends with all new queries over
the keys that it keeps, and one exchange a layer brings the results and their log-sum-exp together:
an all-gather, or by heads an all-to-all (`decode_features`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ringcompile.axes import HALVES, KEEP_TOKENS, TIME
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, map_values, operands, target_name, with_argument
from ringcompile.ir.expr import (
    SEQUENCE,
    equal,
    is_symbolic,
    of_tokens,
    product,
    simplify,
    spelled,
    symbol,
)
from ringcompile.ir.layout import WHOLE, Atom, Layout
from ringcompile.ir.nodes import error_at, layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.cached import KEPT_STATES, KEPT_TOKENS
from ringcompile.ops.running import ALONG, SCANS, dim_along
from ringcompile.ops.schemas import op
from ringcompile.ops.slots import BLOCK
from ringcompile.passes.base import Pass, refuse
from ringcompile.passes.carried_dims import COUNTED, check_call, is_last, is_positions
from ringcompile.passes.carry.attention import AttentionWriter, check_fixed_keys, splits_of
from ringcompile.passes.carry.context import NEW, Carrying
from ringcompile.passes.carry.shifts import ShiftWriter
from ringcompile.passes.ranges import range_at
from ringcompile.passes.requests import REDISTRIBUTE, placeholders_first
from ringcompile.passes.windows.shift_forms import NEEDS_ALL

aten = torch.ops.aten


def carried_mesh(mesh: Mesh) -> Mesh:
    """The mesh that `place` sees: `time` in place of the axes that the cache lies along.

    Raises:
        RingCompileError: an axis that no program with a cache is written for.
    """
    if mesh.size(HALVES) > 1:
        raise RingCompileError(
            f"a cache cannot be combined with {HALVES}={mesh.size(HALVES)}",
            hint=f"leave out {HALVES} (--overlap {HALVES})",
        )
    kept = tuple((name, size) for name, size in mesh.axes if name not in (*KEEP_TOKENS, TIME))
    return Mesh((*kept, (TIME, 2)))  # any number of chunks: the program is written for one


@dataclass(frozen=True)
class Carry(Pass):
    """Write a program that is placed along `time` for the new tokens of one call.

    Attributes:
        mesh: the parallel plan that it is for.
        capacity: the tokens that a sequence may have in all.
        helix: whether the program is placed with features over the axes of the cache as well.
    """

    name: ClassVar[str] = "carry"
    mesh: Mesh
    capacity: int
    helix: bool = False

    def run(self, program: Program) -> Program:
        """The program for `s` new tokens; what it keeps are placeholders named in `state`.

        Raises:
            RingCompileError: with the user's line, where a result would change when a later token
                comes, or where a length is used as a number.
        """
        return _Carrier(program, self.mesh, self.capacity, self.helix).run()


class _Carrier:
    def __init__(self, program: Program, mesh: Mesh, capacity: int, helix: bool) -> None:
        self.program, self.mesh = program, mesh
        self.into = Carrying(program, mesh, capacity, helix)
        self.builder, self.attention = self.into.builder, AttentionWriter(self.into)
        self.shifts = ShiftWriter(self.into)

    def run(self) -> Program:
        _check_length(self.program, self.into.capacity)
        for node in self.program.graph.nodes:
            self.builder.at(node)
            try:
                self._write(node)
            except RingCompileError as error:
                raise refuse(node, error) from None
        return self.program.with_graph(
            placeholders_first(self.builder.graph),
            state=self.into.state,
            mesh=self.mesh,
            sequence=SequenceSplit((), "contiguous", NEW),
            length_range=(1, self.into.capacity),
            microbatches=1,  # a cache holds all sequences of a replica
        )

    def _write(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.builder.env[node] = self._placeholder(node)
        elif self.shifts.handles(node):
            self.builder.env[node] = self.shifts.write(node)
        elif node.op == "call_function":
            step = _STEPS.get(target_name(node.target), _Carrier._call)
            self.builder.env[node] = step(self, node)
        else:
            self.builder.output(tuple(map(self._output, self.program.outputs)))

    # -- inputs and outputs ------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> fx.Node:
        """A weight as it is; of an input the new tokens, or all that there have been so far."""
        type_ = type_of(node)
        new = self.builder.placeholder(node.name, self.into.type(type_))
        if node.name in self.program.placeholders and TIME not in type_.layout.axes:
            long = [size for size in type_.shape if of_tokens(size)]
            if len(long) > 1:
                raise RingCompileError(
                    f"input '{self.program.placeholders[node.name]}' has an entry for every pair "
                    "of tokens; with a cache, each call may pass only one entry for each new token",
                    hint="pass a mask of shape [batch, tokens]",
                )
            if long:
                self.into.state[new.name] = "history"
        return new

    def _output(self, node: fx.Node) -> fx.Node:
        if self.shifts.handles(node):
            return self.shifts.leave(node)
        if any(map(of_tokens, type_of(self.builder.env[node]).shape)) or not any(
            map(of_tokens, type_of(node).shape)
        ):
            return self.builder.env[node]
        raise error_at(node, "with a cache, an output may not be computed from positions alone "
                             "for the whole sequence",
                       hint="return what is computed from tokens only")

    # -- ops ---------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> fx.Node:
        """The same op, on the new tokens or for all positions that there may be."""
        new = self.builder.copy(node)
        new.meta["type"] = self.into.type(node.meta["type"])
        if node.target is operator.getitem:
            return new
        rule = self.shifts.check(node)
        self._check_table(node)
        new.args, new.kwargs = map_values(
            (new.args, dict(new.kwargs)), lambda v: self.into.size(v) if is_symbolic(v) else v
        )
        if rule is not None and rule.shape_argument is not None:
            new.args, new.kwargs = with_argument(
                new, new.args, dict(new.kwargs), rule.shape_argument, spelled(type_of(new).shape)
            )
        return new

    def _check_table(self, node: fx.Node) -> None:
        """Raise RingCompileError where positions are looked up in a table that has too few rows."""
        if node.target is not aten.embedding.default:
            return
        index, rows = Call(node)["indices"], type_of(Call(node)["weight"]).shape[0]
        if is_positions(index) and isinstance(rows, int) and rows < self.into.capacity:
            raise error_at(
                node, f"a cache for {self.into.capacity} tokens: the position table has only "
                f"{rows} rows",
                hint=f"pass a cache of {rows} tokens or fewer",
            )

    def _arange(self, node: fx.Node) -> fx.Node:
        call, type_ = Call(node), type_of(node)
        if TIME not in type_.layout.axes:
            return self._call(node)
        check_call(node)
        return range_at(self.builder, self.into.positions, call, self.into.type(type_))

    def _redistribute(self, node: fx.Node) -> fx.Node:
        """New tokens of what all positions have; what `tp` does stays as it is."""
        (source,) = operands(node)
        have, want = type_of(source), type_of(node)
        between = self.shifts.handles(source)
        x = self.shifts.leave(source) if between else self.builder.env[source]
        if TIME in have.layout.axes and TIME not in want.layout.axes:
            if all(is_last(user, self.into.length) for user in node.users):
                return x
            raise _needs_all(node)
        if TIME in want.layout.axes and TIME not in have.layout.axes and not between:
            x = self._new_of(x, have, want)
        target = self.into.type(want)
        if type_of(x).layout == target.layout:
            return x
        return self.builder.call(
            REDISTRIBUTE, (x,), target, name=node.name, why=node.meta.get("why"),
            layout=str(target.layout),
        )

    def _new_of(self, x: fx.Node, have: TensorType, want: TensorType) -> fx.Node:
        """The entries of the new tokens of a value that has one for every position."""
        (dim,) = (i for i, d in enumerate(want.layout.dims) if any(TIME in a.axes for a in d))
        before = [Atom(a.size, (), a.sequence) for a in want.layout.dims[dim]]
        place = next(i for i, a in enumerate(want.layout.dims[dim]) if TIME in a.axes)
        sizes = [self.into.size(atom.size) for atom in before]
        shape, dims = type_of(x).shape, type_of(x).layout.dims
        if len(sizes) > 1:
            x = self.into.reshaped(x, (*shape[:dim], *sizes, *shape[dim + 1 :]),
                               (*dims[:dim], *(WHOLE,) * len(sizes), *dims[dim + 1 :]))
        opened = type_of(x)
        picked = (*opened.shape[: dim + place], NEW, *opened.shape[dim + place + 1 :])
        x = self.builder.call(
            aten.index_select.default, (x, dim + place, self.into.positions),
            TensorType(have.dtype, picked, opened.layout), why="of the new tokens",
        )
        if len(sizes) == 1:
            return x
        flat = product([*sizes[:place], NEW, *sizes[place + 1 :]])
        return self.into.reshaped(x, (*shape[:dim], flat, *shape[dim + 1 :]), dims)

    def _last(self, node: fx.Node) -> fx.Node:
        """The last token of the sequence is the last of the new ones."""
        (source,) = operands(node)
        if source.target is not REDISTRIBUTE or not is_last(node, self.into.length):
            return self._call(node)
        dim, is_select = Call(node)["dim"], node.target is aten.select.int
        where = (dim, -1) if is_select else (dim, simplify(NEW - 1), NEW, 1)
        return self.builder.call(
            node.target, (self.builder.env[source], *where),
            self.into.type(type_of(node)), name=node.name, why="of the new tokens",
        )

    def _scan(self, node: fx.Node) -> fx.Node:
        """A scan goes on from where the tokens before ended."""
        call, type_ = Call(node), type_of(node)
        dim = dim_along(node) % len(type_.shape)
        if TIME not in layout_of(node).axes or not type_.layout.dims[dim]:
            return self._call(node)
        if len(type_.layout.dims[dim]) > 1:
            raise error_at(node, "a prefix sum runs over the tokens of several sequences",
                           hint=f"sum along the tokens of each sequence; {COUNTED}")
        new, name = self.into.type(type_), f"cached_{node.name}"
        entering = [self.builder.env[operand] for operand in call.operands]
        if node.target is op("linear_attention"):
            return self._linear_attention(call, new, name)
        if node.target is op("recurrence"):
            # States may be large: of the last tokens only, so far as `rewind` may go back.
            kept = self.into.keep(name, "recent", _grown(new, dim, BLOCK + 1))
            return self.builder.call(
                op("running_recurrence"), (*entering, kept, self.into.positions), new,
                name=node.name, dim=dim,
            )
        sums = self.into.keep(name, "sums", _grown(new, dim, self.into.capacity + 1))
        return self.builder.call(
            op("running_sum"), (*entering, sums, self.into.positions), new,
            name=node.name, dim=dim, dtype=new.dtype, by=SCANS[target_name(node.target)].name,
        )

    def _linear_attention(self, call: Call, new: TensorType, name: str) -> fx.Node:
        """It goes on from a state; with it the tokens of its last blocks are kept."""
        q, k, v, decay, beta = (
            None if call[x] is None else self.builder.env[call[x]]
            for x in ("q", "k", "v", "decay", "beta")
        )
        dim, size = len(new.shape) - 2, type_of(call["k"]).shape[-1]
        states = TensorType(
            torch.promote_types(new.dtype, torch.float32),
            (*new.shape[:dim], KEPT_STATES, size, new.shape[-1]),
            Layout((*new.layout.dims[:dim], WHOLE, WHOLE, new.layout.dims[-1])),
        )
        kept = [
            None if x is None else self.into.keep(
                f"{name}_{what}", "recent", _grown(type_of(x), dim, KEPT_TOKENS)
            )
            for what, x in (("keys", k), ("values", v), ("decays", decay), ("betas", beta))
        ]
        behind = self.into.keep(f"{name}_states", "recent", states)
        return self.builder.call(
            op("running_linear_attention"),
            (q, k, v, decay, beta, *kept, behind, self.into.positions), new, name=call.node.name,
        )

    def _attention(self, node: fx.Node) -> fx.Node:
        split = splits_of(node)
        if all(split):
            return self.attention.write(node)
        check_fixed_keys(node, split)
        return self._call(node)


def _grown(type_: TensorType, dim: int, size: int) -> TensorType:
    """The type with another number of entries along a dim."""
    shape = (*type_.shape[:dim], size, *type_.shape[dim + 1 :])
    return TensorType(type_.dtype, shape, type_.layout)


def _check_length(program: Program, capacity: int) -> None:
    """Raise RingCompileError where positions are not those of the inputs, or too many."""
    assert program.sequence is not None
    length = program.sequence.length
    if not equal(length, symbol(SEQUENCE)):
        raise RingCompileError(
            f"with a cache, attention has to be over the tokens of the inputs; here it is over "
            f"{length} positions",
            hint="; ".join(program.notes) or "prefix tokens and patches are not supported",
        )
    high = program.length_range[1]
    if high is not None and capacity > high:
        raise RingCompileError(
            f"a cache for {capacity} tokens: the model's own code allows {high} at most",
            hint=f"pass a cache of {high} tokens or fewer",
        )


def _needs_all(node: fx.Node) -> RingCompileError:
    """Why a value of all tokens cannot be had, at the op that wants it."""
    at = next((user for user in node.users if "loc" in user.meta), node)
    return error_at(
        at, f"with a cache, this {NEEDS_ALL}",
        hint="leave out --cache, or compute each result from the current and earlier tokens only",
    )


_STEPS = {
    "aten.arange.start_step": _Carrier._arange,
    **dict.fromkeys(ALONG, _Carrier._scan),
    **dict.fromkeys(("aten.select.int", "aten.slice.Tensor"), _Carrier._last),
    "ringcompile.redistribute.default": _Carrier._redistribute,
    "ringcompile.attention.default": _Carrier._attention,
}
