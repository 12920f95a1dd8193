"""A program: one fx.Graph with typed, located nodes, and what it needs from outside.

Weights are names and shapes, never data: the data stays with a `WeightSource` until something runs
or is saved. Every node's `meta` holds `type` (see types.py) and `loc` (the user's source line), and
nodes that a pass made hold `why`, one phrase that dumps print.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ringcompile.axes import HALVES
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.expr import (
    BATCH,
    LENGTHS,
    SEQUENCE,
    Size,
    bind,
    is_symbolic,
    symbol,
    symbols_in,
)
from ringcompile.ir.legend import rank_text
from ringcompile.ir.printer import print_program
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.mesh import Mesh

# How a program gets the data of a weight: by its name in the weight table.
WeightSource = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """A parameter, buffer or constant of the model, by its qualified name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size in bytes of the whole tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class IdLimit:
    """Which ids a table has rows for, and the line that looks them up.

    Attributes:
        low, high: the smallest and the largest id.
        location: of the look-up.
    """

    low: int
    high: int
    location: SourceLocation = field(default_factory=SourceLocation)


@dataclass(frozen=True)
class Input:
    """One tensor the caller passes.

    Attributes:
        name: of the argument.
        type: the global one.
        limits: which ids it may hold.
        values: its entries in order, where the program is for these alone.
    """

    name: str
    type: TensorType
    limits: tuple[IdLimit, ...] = ()
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Structure:
    """How outputs are nested: a tensor, or a tuple, list or dict of structures.

    Attributes:
        kind: "tensor", "none", "constant", "tuple", "list" or "dict".
        keys: the keys of a dict, in order.
        children: the nested structures, in order.
        value: of a constant, a number, a bool or a string that every call returns.
    """

    kind: str
    keys: tuple[str, ...] = ()
    children: tuple[Structure, ...] = ()
    value: bool | int | float | str = 0

    def build(self, leaves: Iterable[Any], constant: Callable[[Any], Any] = lambda x: x) -> Any:
        """Nest the leaves, taken in order; `constant` is applied to values that are constants."""
        return self._build(iter(leaves), constant)

    def _build(self, leaves: Any, constant: Callable[[Any], Any]) -> Any:
        if self.kind == "tensor":
            return next(leaves)
        if self.kind == "none":
            return None
        if self.kind == "constant":
            return constant(self.value)
        built = [child._build(leaves, constant) for child in self.children]
        if self.kind == "dict":
            return dict(zip(self.keys, built, strict=True))
        return tuple(built) if self.kind == "tuple" else built


@dataclass(repr=False)
class Program:
    """A graph, its inputs, weights and outputs, and how far it has been compiled.

    Attributes:
        graph: placeholders for weights and inputs, calls, one output node with a flat tuple.
        inputs: what the caller passes, in order, with global types.
        placeholders: placeholder name -> the input it takes (several may take one input, each in
            its own layout).
        weights: placeholder name -> weight.
        output_structure: how the flat outputs are nested for the caller.
        source: where the data of weights comes from, when something needs it.
        length_range: smallest and largest sequence length the captured code is valid for.
        other_ranges: the same of further lengths, by symbol: of `s2`, a decoder's beside an
            encoder's, and so on.
        batch_range: the same of the number of sequences in a batch.
        returns: where the program is for a part of a batch, the outputs' types with their layouts
            along the batch; placeholders that come in parts have `k` sequences.
        microbatches: in how many parts each replica runs its share of a batch; None leaves it to
            the batch.
        mesh, sequence: the parallel plan, once `place` has run.
        coordinates: this rank's place on the mesh, once `specialize` has run.
        passes: the passes that ran, in order.
        notes: what the user should know of how it was compiled.
        without_rule: of these, what has no rule and is computed whole on every rank, on request.
        lengths: symbols whose value is fixed.
        tp_plan: what the model says of how its layers split, by pattern of layer names.
        state: placeholder name -> the kind of state, of a program with a cache: see `ir/state.py`.
        from_file: it was read from a file, which may ask for anything.
        captured: the program that this one was made from, as it was before any pass.
    """

    graph: fx.Graph
    inputs: tuple[Input, ...]
    placeholders: dict[str, str]
    weights: dict[str, Weight]
    output_structure: Structure
    length_range: tuple[int, int | None] = (2, None)
    other_ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    batch_range: tuple[int, int | None] = (1, None)
    returns: tuple[TensorType, ...] = ()
    microbatches: int | None = None
    name: str = "model"
    source: WeightSource | None = None
    mesh: Mesh | None = None
    sequence: SequenceSplit | None = None
    coordinates: dict[str, int] | None = None
    passes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    without_rule: tuple[str, ...] = ()
    lengths: dict[str, int] = field(default_factory=dict)
    tp_plan: dict[str, str] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)
    from_file: bool = False
    captured: Program | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return print_program(self)

    def __repr__(self) -> str:
        calls = sum(node.op == "call_function" for node in self.graph.nodes)
        mesh = "" if self.mesh is None else f", {self.mesh}"
        return f"<Program {self.name}: {calls} ops{mesh}, {rank_text(self)}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def with_graph(self, graph: fx.Graph, **changes: Any) -> Program:
        """The same program over another graph."""
        return replace(self, graph=graph, **changes)

    @property
    def batch(self) -> Size:
        """The sequences of a batch: `b`, or where that is fixed, the first dim of most inputs.

        Inputs whose first dim is 1 are the same for all sequences; of two sizes as frequent it is
        the larger one.
        """
        shapes = [spec.type.shape for spec in self.inputs]
        if any(size == symbol(BATCH) for shape in shapes for size in shape):
            return symbol(BATCH)
        sizes = Counter(
            shape[0] for shape in shapes
            if len(shape) > 1 and isinstance(shape[0], int) and shape[0] > 1
        )
        return max(sizes, key=lambda size: (sizes[size], size), default=1)

    @property
    def batch_multiple(self) -> int:
        """What a batch has to be a multiple of: 2 where halves of it are computed apart."""
        return 1 if self.mesh is None else self.mesh.size(HALVES)

    @property
    def output_node(self) -> fx.Node:
        """The one node that returns; its argument is the flat tuple of outputs."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes the program returns."""
        return tuple(self.output_node.args[0])  # type: ignore[arg-type]

    def nested(self, texts: Iterable[str]) -> Any:
        """A text an output, nested as the model returns them; () of a stage that returns none."""
        return self.output_structure.build(texts, repr) if self.outputs else ()

    def bindings(self, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
        """The lengths in these inputs; raises RingCompileError where shapes do not fit the program.

        Args:
            inputs: whole (unsplit) tensors by input name.
        """
        lengths: dict[str, int] = dict(self.lengths)
        for spec in self.inputs:
            tensor = inputs[spec.name]
            expected = "[" + ", ".join(map(str, spec.type.shape)) + "]"
            if tensor.dim() != len(spec.type.shape) or tensor.dtype != spec.type.dtype:
                raise RingCompileError(
                    f"input '{spec.name}' is {tensor.dtype} {list(tensor.shape)}, "
                    f"the program takes {spec.type.dtype} {expected}"
                )
            for size, dim in zip(tensor.shape, spec.type.shape, strict=True):
                _match(spec.name, size, dim, lengths, list(tensor.shape), expected)
        return self.checked(lengths)

    def checked(self, lengths: dict[str, int]) -> dict[str, int]:
        """The lengths, and those of a rank's share; raises RingCompileError for what cannot be."""
        batch = lengths.get(BATCH)
        if batch is not None and batch % self.batch_multiple:
            raise RingCompileError(
                f"a batch of {batch} cannot be split into {self.batch_multiple} equal parts",
                hint=f"pass a multiple of {self.batch_multiple} sequences, or compile without "
                f"{HALVES} (--overlap {HALVES})",
            )
        _check_range(self.length_range, lengths.get(SEQUENCE), _LENGTHS, self.notes)
        for name, range_ in self.other_ranges.items():
            of = next((i.name for i in self.inputs if symbol(name) in i.type.shape), name)
            words = (f"length {{}} of the input '{of}'", *_LENGTHS[1:])
            _check_range(range_, lengths.get(name), words, self.notes)
        _check_range(self.batch_range, batch, _BATCHES, self.notes)
        if self.sequence is not None:
            lengths.update(self.sequence.bindings(lengths))
        return lengths

    def at_length(self, length: int) -> dict[str, int]:
        """All lengths of the inputs where the sequence has that one, which others have as well.

        Others are as long as the program takes at most, or at least; what is fixed stays fixed.
        """
        found = {SEQUENCE: length}
        for name in self.length_names:
            low, high = self.other_ranges.get(name, (1, None))
            found.setdefault(name, max(low, length if high is None else min(length, high)))
        return {**found, **{n: v for n, v in self.lengths.items() if n in LENGTHS}}

    @property
    def length_names(self) -> tuple[str, ...]:
        """The symbols of the lengths that inputs have, `s` first."""
        found = {
            name for spec in self.inputs for size in spec.type.shape if is_symbolic(size)
            for name in symbols_in(size)
        }
        return tuple(name for name in LENGTHS if name in found)


# What a size is called; one of it; several; why else a range begins at 2; what else fixes it.
_FIXED = "the model's own code fixes this range ({})"
_LENGTHS = ("sequence length {}", "one token", "{} tokens",
            "capture did not check that the program is right for a single token",
            _FIXED.format("a position table, or a guard"))
_BATCHES = ("a batch of {}", "one sequence", "{} sequences",
            _FIXED.format("a guard"), _FIXED.format("a guard"))


def _check_range(
    range_: tuple[int, int | None], size: int | None, words: tuple[str, ...], notes: Iterable[str]
) -> None:
    """Raise RingCompileError, with why that is so as far as notes say it, for what cannot be."""
    low, high = range_
    if size is None or (low <= size and (high is None or size <= high)):
        return
    name, one, several, not_tried, fixed = words
    few = (f"{one} alone is refused", f"{several.format(low - 1)} alone are refused")
    said = [note for note in notes if size < low and any(text in note for text in few)]
    hint = next(iter(said), not_tried if (size, low) == (1, 2) else fixed)
    raise RingCompileError(
        f"{name.format(size)} is outside {low}..{'' if high is None else high}", hint=hint
    )


def _match(
    name: str, size: int, dim: Size, lengths: dict[str, int], shape: list[int], expected: str
) -> None:
    wanted = bind(dim, lengths)
    if not isinstance(wanted, int):
        lengths[str(wanted)] = size
    elif wanted != size:
        raise RingCompileError(
            f"input '{name}' has shape {shape}, the program takes {expected}"
            + (f" with {lengths}" if lengths else ""),
            hint="batch and length may change from run to run, other sizes are fixed at capture; "
            "capture(..., dims=...) says which dims vary where shapes alone do not",
        )
