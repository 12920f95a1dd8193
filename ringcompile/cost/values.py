"""The values of one rank's program at known lengths: local shapes, strides and who owns memory.

Tensors on the meta device stand for values: they have strides and storages but no data. Views are
run on them, so that what is a view and what must copy is torch's own answer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import torch
from torch import fx

from ringcompile.axes import KEEP_TOKENS
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import map_values, target_name
from ringcompile.ir.communication import DISPATCH
from ringcompile.ir.expr import BATCH, FIRST, OWN, PART, SEQUENCE, Size, bind, is_symbolic
from ringcompile.ir.kinds import is_elementwise, looks_at
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ir.verifier import CONSUMING
from ringcompile.mesh import Mesh
from ringcompile.ops.bodies import body_of

# Attention over queries [B,H,S,D], and its state brought into the model's dtype.
_IN_ORDER = frozenset(
    f"ringcompile.{name}.default"
    for name in ("attention", "block_attention", "cached_attention", "finish")
)
_MERGED_STATES = "ringcompile.merge_states.default"  # of parts [ranks,S,B,H,E+1]
Value: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"


def bind_lengths(
    program: Program, length: int | None, batch: int | None = None, context: int | None = None
) -> dict[str, int]:
    """The values of all size symbols of a rank's program for a sequence length.

    Args:
        program: of one rank, or of a single device.
        length: of the whole sequence; None where the program fixes it.
        batch: sequences that the program runs at a time; None for the fewest.
        context: of a program with a cache, the tokens in it after the run; None for the new ones
            alone. A rank keeps its even share of them.

    Raises:
        RingCompileError: the program needs a length and none is given, or it is fixed to another.
    """
    fixed = program.lengths.get(SEQUENCE)
    if fixed is not None and length not in (None, fixed):
        raise RingCompileError(f"the program is for {fixed} tokens, {length} are asked for")
    known = program.at_length(length) if length is not None else dict(program.lengths)
    sequences = max(batch or 1, program.batch_range[0])
    known |= {BATCH: sequences, PART: sequences, FIRST: 0}
    known |= _slots_in_use(program, context or length or 1)
    low, high = program.length_range
    if length is not None and (length < low or (high is not None and length > high)):
        raise RingCompileError(
            f"sequence length {length} is outside {low}..{high if high is not None else ''}",
            hint="the model's own code fixes this range (a position table, or a guard)",
        )
    sequence, coordinates = program.sequence, program.coordinates
    if sequence is None:
        return known
    known |= sequence.bindings(known)
    if coordinates is not None:
        known[OWN] = sequence.own_length(coordinates, known)
    return known


def _slots_in_use(program: Program, context: int) -> dict[str, int]:
    """The number of cached keys that a rank attends to, by the symbol that stands for it."""
    mesh = program.mesh or Mesh(())
    ranks = prod(mesh.size(axis) for axis in KEEP_TOKENS)
    return {
        str(type_of(node).shape[0]): -(-context // ranks)
        for node in program.graph.nodes
        if node.op == "placeholder" and program.state.get(node.name) == "places"
    }


@dataclass
class Values:
    """What each node of a program is, in local shapes.

    Args:
        program: of one rank.
        lengths: from `bind_lengths`.
    """

    program: Program
    lengths: Mapping[str, int]
    of: dict[fx.Node, Value] = field(default_factory=dict, init=False)
    _shapes: dict[TensorType, tuple[int, ...]] = field(default_factory=dict, init=False)
    _rows: dict[str, int] = field(default_factory=dict, init=False)
    _numbers: dict[Size, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for node in self.program.graph.nodes:
            if node.op != "output":
                self.of[node] = self._value(node)

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The value of a node that returns one tensor."""
        value = self.of[node]
        assert isinstance(value, torch.Tensor), f"{node.name} returns several tensors"
        return value

    def argument(self, value: Any) -> Any:
        """An argument of a call: nodes as their values, expressions as numbers."""
        if isinstance(value, fx.Node):
            return self.of[value]
        return self.number(value) if is_symbolic(value) else value

    def number(self, size: Size) -> int:
        """A size as a number.

        Of sizes that only the data tells, the rows that arrive for a rank's experts are as many as
        it sent, and others as many as its tokens.
        """
        if isinstance(size, int):
            return size
        if size not in self._numbers:
            bound = bind(size, {**self.lengths, **self._rows})
            if not isinstance(bound, int):
                share = self.lengths.get(OWN, self.lengths.get(SEQUENCE, 1))
                bound = int(bind(bound, {str(s): share for s in bound.free_symbols}))
            self._numbers[size] = bound
        return self._numbers[size]

    def shape(self, type_: TensorType) -> tuple[int, ...]:
        """The local shape of a type."""
        if type_ not in self._shapes:
            sizes = local_shape(type_, self.program.mesh, self.program.sequence)
            self._shapes[type_] = tuple(map(self.number, sizes))
        return self._shapes[type_]

    def _value(self, node: fx.Node) -> Value:
        target = target_name(node.target)
        if node.op == "call_function":
            if node.target is operator.getitem:
                return self.of[node.args[0]][node.args[1]]  # type: ignore[index]
            if looks_at(node.target) == "view":
                return self._view(node)
            if looks_at(node.target) == "same":
                return self.of[node.args[0]]  # type: ignore[index]
            if target in CONSUMING:
                return self._merged(node)
            if target == DISPATCH:
                arriving, order = type_of(node).shape[0], self.argument(node.args[1])
                if is_symbolic(arriving):
                    self._rows[str(arriving)] = order.numel()
                    self._numbers.clear()
            if target in _IN_ORDER:
                like = self.of[node.all_input_nodes[0]]
                return self._in_order(node, like[0] if isinstance(like, tuple) else like)
            if target == _MERGED_STATES:
                return self._in_order(node, self.tensor(node.args[0])[0].permute(1, 2, 0, 3))  # type: ignore[arg-type]
        made = tuple(self._made(node, type_) for type_ in results_of(node))
        return made if isinstance(node.meta["type"], tuple) else made[0]

    def _view(self, node: fx.Node) -> torch.Tensor:
        args, kwargs = map_values((list(node.args), dict(node.kwargs)), self.argument)
        viewed: torch.Tensor = body_of(node.target)(*args, **kwargs)
        return viewed

    def _in_order(self, node: fx.Node, like: torch.Tensor) -> Value:
        """What an attention gives, its first three dims in memory as those of its queries."""
        order = sorted(range(3), key=like.stride, reverse=True)
        back = [*map(order.index, range(3)), 3]
        made = []
        for type_ in results_of(node):
            shape = self.shape(type_)
            if len(shape) == 4:
                sizes = [*(shape[dim] for dim in order), shape[3]]
                out = torch.empty(sizes, dtype=type_.dtype, device="meta").permute(back)
            else:
                out = torch.empty(shape, dtype=type_.dtype, device="meta")
            made.append(out)
        return tuple(made) if isinstance(node.meta["type"], tuple) else made[0]

    def _merged(self, node: fx.Node) -> Value:
        """The state that a block is merged into, which is widened once."""
        out, lse = self.of[node.args[0]]  # type: ignore[index]
        return (out if out.dtype == lse.dtype else out.to(lse.dtype)), lse

    def _made(self, node: fx.Node, type_: TensorType) -> torch.Tensor:
        """New memory; strides as of the first operand of the same shape, as elementwise ops do."""
        shape = self.shape(type_)
        for operand in node.all_input_nodes if is_elementwise(node.target) else ():
            value = self.of[operand]
            if isinstance(value, torch.Tensor) and value.shape == shape:
                if value.is_contiguous():  # `empty_like` is written in Python, and takes long
                    break
                return torch.empty_like(value, dtype=type_.dtype)
        return torch.empty(shape, dtype=type_.dtype, device="meta")


def storages(value: Value) -> Iterator[tuple[int, int]]:
    """The memory that a value is in: an identity and a size in bytes, for each tensor."""
    for tensor in value if isinstance(value, tuple) else (value,):
        storage = tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()


def distinct_bytes(tensor: torch.Tensor) -> int:
    """The bytes that reading a tensor touches: what was expanded is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.dtype.itemsize
