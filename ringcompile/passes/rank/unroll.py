"""What an axis without ranks splits becomes a run of pieces, in one program of one rank.

Up to here a program for `time=4` is like one for `ring=4`, with the coordinate `time` in it. Here
it is written out once for every value of it: keys and values of other pieces are not sent for, they
are other nodes of the same graph. With causal attention a piece needs nothing of later ones, so a
pipeline stage sends its piece on and takes up the next while the next stage works on the first
(Li et al., "TeraPipe", 2021). Without stages, pieces take turns from exchange to exchange, so that
one can compute while what another one needs is on its way.

What does not depend on the piece (a rotary table, a whole mask) is computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import map_values, target_name
from ringcompile.ir.communication import COLLECTIVES, SHIFT, WAIT
from ringcompile.ir.expr import is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass, refuse
from ringcompile.passes.cleanup import CleanUp
from ringcompile.passes.rank.batch_halves import BatchHalves
from ringcompile.passes.rank.time_pieces import TimePieces


@dataclass(frozen=True)
class Unroll(Pass):
    """Write a program out for every piece in time, and for both halves of a batch.

    p = positions([time], chunk=n)          ->  p_0 = positions([0], ...); p_1 = positions([1], ...)
    y = linear(x, w)                        ->  y_0 = linear(x_0, w);      y_1 = linear(x_1, w)
    o = ring_attention(q, k, v, axis=time)  ->  o_1: q_1 over k_1, v_1, and over k_0, v_0
    t = shift_start(y, axis=pp, to=1)       ->  a transfer for each piece
    x: f32[b/2, s, 8]  = input              ->  x_half0 = x[: b/2];        x_half1 = x[b/2 :]
    """

    name: ClassVar[str] = "unroll"

    def run(self, program: Program) -> Program:
        """The program of the same rank without `time` and `halves`; one without them stays as is.

        Raises:
            RingCompileError: an op communicates along `time` in a way that is not known.
        """
        for kind in (TimePieces, BatchHalves):
            if program.mesh is not None and program.mesh.size(kind.axis) > 1:
                program = CleanUp().run(_Unroller(program, kind).run())
        return program


class _Unroller:
    def __init__(self, program: Program, kind: type[TimePieces | BatchHalves]) -> None:
        self.program, self.builder = program, Builder()
        self.pieces = kind(program, self.builder)
        self.count = self.pieces.count
        self.calls = [node for node in program.graph.nodes if node.op == "call_function"]
        self.varying = self._varying()
        # For each piece what stands for a node of it, and what is the same for all.
        self.env: list[dict[fx.Node, fx.Node]] = [{} for _ in range(self.count)]
        self.shared: dict[fx.Node, fx.Node] = {}
        self.cut: dict[fx.Node, fx.Node] = {}  # inputs of which each piece takes a part
        self.unsent: dict[fx.Node, Callable[[], fx.Node]] = {}
        starts = [node for node in self.calls if target_name(node.target) == SHIFT]
        self.sends = [node for node in starts if node.kwargs["source"] is None]
        self.receives = [node for node in starts if node.kwargs["source"] is not None]

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                given = self.builder.placeholder(node.name, self.pieces.outside(type_of(node)))
                (self.cut if node in self.varying else self.shared)[node] = given
        waiting = [
            deque(node for node in self._ordered() if node in self.varying or piece == 0)
            for piece in range(self.count)
        ]
        while any(waiting):
            before = sum(map(len, waiting))
            for piece, rest in enumerate(waiting):
                self._advance(rest, piece)
            assert sum(map(len, waiting)) < before, f"%{waiting[0][0].name} is never ready"
        for finish in self.unsent.values():
            finish()
        self.builder.output(tuple(map(self._whole, self.program.outputs)))
        return self.program.with_graph(self.builder.graph, **self.pieces.changes())

    def _varying(self) -> dict[fx.Node, None]:
        """What is another value for every piece, in order."""
        varying: dict[fx.Node, None] = {}
        for node in self.program.graph.nodes:
            if self.pieces.joins(node):
                continue  # all get the same
            reads = node.op == "call_function" and any(n in varying for n in node.all_input_nodes)
            if reads or self.pieces.varies(node):
                varying[node] = None
        return varying

    def _ordered(self) -> list[fx.Node]:
        """The calls, and inputs of which a piece takes a part, each before what reads it."""
        return [*self.cut, *self.calls]

    # -- in which order ------------------------------------------------------------------------

    def _advance(self, rest: deque[fx.Node], piece: int) -> None:
        """Write what a piece is ready for: to its end where it is sent on, else to an exchange."""
        while rest and self._is_ready(rest[0], piece):
            node = rest.popleft()
            self._emit(node, piece)
            if not (self.sends or self.receives) and _exchanges(node):
                return

    def _is_ready(self, node: fx.Node, piece: int) -> bool:
        """Whether what the node reads, of its own piece and of others, is there."""
        if node in self.sends and piece and not all(
            self._is_there(send, piece - 1) for send in self.sends
        ):
            return False  # the next stage takes pieces in order
        if not all(self._is_there(*other) for other in self.pieces.others(node, piece)):
            return False
        return all(self._is_there(operand, piece) for operand in node.all_input_nodes)

    def _is_there(self, node: fx.Node, piece: int) -> bool:
        return node in self.shared or node in self.env[piece]

    def _emit(self, node: fx.Node, piece: int) -> None:
        self.builder.at(node)
        try:
            if node.op == "placeholder":
                self._keep(node, piece, self.pieces.part(
                    self.cut[node], node, piece, self._name(node, piece)
                ))
            elif target_name(node.target) in (SHIFT, WAIT):
                self._transfer(node, piece)
            else:
                made = self.pieces.write(node, piece, self._value, self._name(node, piece))
                self._keep(node, piece, self._copy(node, piece) if made is None else made)
        except RingCompileError as error:
            raise refuse(node, error) from None

    # -- nodes ---------------------------------------------------------------------------------

    def _value(self, node: fx.Node, piece: int) -> fx.Node:
        return self.env[piece][node] if node in self.env[piece] else self.shared[node]

    def _keep(self, node: fx.Node, piece: int, new: fx.Node) -> fx.Node:
        new.meta.update({k: node.meta[k] for k in ("stage", "mask_kind") if k in node.meta})
        (self.env[piece] if node in self.varying else self.shared)[node] = new
        return new

    def _copy(self, node: fx.Node, piece: int, **changed: Any) -> fx.Node:
        """The node for one piece; `changed` are keyword arguments that take other values."""
        args, kwargs = map_values(
            (node.args, {**node.kwargs, **changed}), lambda value: self._argument(value, piece)
        )
        value = node.meta["type"]
        inside = partial(self.pieces.inside, piece=piece)
        return self.builder.call(
            node.target, args,
            tuple(map(inside, value)) if isinstance(value, tuple) else inside(value),
            name=self._name(node, piece),
            why=node.meta.get("why") or (f"piece {piece}" if node in self.varying else None),
            **kwargs,
        )

    def _argument(self, value: Any, piece: int) -> Any:
        if isinstance(value, fx.Node):
            return self._value(value, piece)
        return self.pieces.at(value, piece) if is_symbolic(value) else value

    def _name(self, node: fx.Node, piece: int) -> str:
        suffix = f"_{self.pieces.suffix}{piece}"
        return f"{node.name}{suffix}" if node in self.varying else node.name

    def _whole(self, node: fx.Node) -> fx.Node:
        """An output, of all pieces."""
        if node in self.shared:
            return self.shared[node]
        return self.pieces.whole([self._value(node, piece) for piece in range(self.count)], node)

    # -- transfers between stages --------------------------------------------------------------

    def _transfer(self, node: fx.Node, piece: int) -> None:
        """A piece on its way between stages.

        What comes is asked for one piece ahead, all values of a piece in the order in which they
        are sent. That a piece was sent is waited for when the next one is sent: until then the rank
        computes.
        """
        if node in self.sends:
            if node in self.unsent:
                self.unsent.pop(node)()
            self._start(node, piece)
        elif node in self.receives:
            self._ask(piece)
        elif node.users:
            self._ask(piece + 1)
            self._keep(node, piece, self._copy(node, piece))
        else:
            (started,) = node.all_input_nodes
            self.unsent[started] = lambda: self._keep(node, piece, self._copy(node, piece))

    def _ask(self, piece: int) -> None:
        """For all that comes for a piece, unless that is done."""
        if piece < self.count:
            for start in self.receives:
                if not self._is_there(start, piece):
                    self._start(start, piece)

    def _start(self, node: fx.Node, piece: int) -> None:
        of, suffix = node.kwargs["of"], f"_{self.pieces.suffix}{piece}"
        named = f"{of}{suffix}" if node in self.varying else of
        self._keep(node, piece, self._copy(node, piece, of=named))


def _exchanges(node: fx.Node) -> bool:
    """Whether a rank waits for others in a node."""
    return node.target is op("ring_attention") or target_name(node.target) in COLLECTIVES
