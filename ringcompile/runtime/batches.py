"""A batch dealt out in parts: to replicas (`dp`), and to a pipeline in microbatches.

Which dims of inputs and outputs belong to the batch is in their types: a placeholder that comes in
parts has `k` sequences, and `Program.returns` holds the layout of every output. Parts are as even
as can be: of five sequences, two replicas get three and two. Every replica runs the same number of
microbatches, in order, so that the stages of a pipeline work on different ones at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import BATCH, FIRST, PART, bind, symbol
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.runtime.data import assembled, by_replica
from ringcompile.runtime.outputs import shape_of
from ringcompile.runtime.pieces import Share

Inputs = dict[str, torch.Tensor]
# So many microbatches for each stage, if there are as many sequences: stages idle for a fifth.
_PER_STAGE = 4


@dataclass(frozen=True)
class Part:
    """What one replica runs at a time.

    Attributes:
        count: of how many sequences; 0 where the batch is not dealt out.
        first: the number of the first of them.
        lengths: of the run, with these two.
    """

    count: int
    first: int
    lengths: dict[str, int]

    def needed(self, numbered: bool) -> dict[str, int]:
        """The lengths that a program needs: most do not depend on which sequences these are.

        Args:
            numbered: from `uses_numbers`.
        """
        if numbered:
            return self.lengths
        return {name: value for name, value in self.lengths.items() if name != FIRST}


@dataclass(frozen=True)
class Deal:
    """A batch, dealt.

    Attributes:
        lengths: of the run, the batch included.
        hands: for each replica its microbatches, in order.
    """

    lengths: dict[str, int]
    hands: tuple[tuple[Part, ...], ...]

    def of(self, program: Program) -> tuple[Part, ...]:
        """The microbatches of the replica that a rank's program belongs to."""
        return self.hands[(program.coordinates or {}).get("dp", 0)]


def deal(program: Program, inputs: Mapping[str, torch.Tensor]) -> Deal:
    """Deal a batch out.

    Args:
        program: any rank's program.
        inputs: whole inputs by name.

    Raises:
        RingCompileError: inputs that do not fit the program, or fewer sequences than replicas.
    """
    lengths = program.bindings(dict(inputs))
    mesh = program.mesh
    replicas = mesh.size("dp") if mesh is not None else 1
    if mesh is None or not program.returns:
        return Deal(lengths, ((Part(0, 0, lengths),),) * replicas)
    batch, unit = lengths[BATCH], program.batch_multiple
    if batch < replicas * unit:
        each = "one" if unit == 1 else str(unit)
        raise RingCompileError(
            f"a batch of {batch} is too small for dp={replicas}",
            hint=f"pass at least {replicas * unit} sequences, {each} for each replica",
        )
    runs = num_microbatches(program, batch)
    firsts = [i * (batch // unit) // (replicas * runs) * unit for i in range(replicas * runs + 1)]
    parts = [
        Part(end - first, first, {**lengths, PART: end - first, FIRST: first})
        for first, end in pairwise(firsts)
    ]
    return Deal(
        lengths, tuple(tuple(parts[i * runs : (i + 1) * runs]) for i in range(replicas))
    )


def num_microbatches(program: Program, batch: int) -> int:
    """In how many parts each replica of a program runs its share of a batch.

    As many as the program was compiled for, if it was; else one for each sequence, up to four for
    each stage of a pipeline.
    """
    mesh = program.mesh
    assert mesh is not None
    stages = mesh.size("pp")
    wanted = program.microbatches or (_PER_STAGE * stages if stages > 1 else 1)
    return max(1, min(batch // (mesh.size("dp") * program.batch_multiple), wanted))


def runs_of(program: Program, batch: int) -> tuple[int, int]:
    """How many microbatches each replica runs of a batch, and how many sequences the largest has.

    Args:
        program: any rank's program.
        batch: sequences of all replicas together.
    """
    if not program.returns or program.mesh is None:
        return 1, batch
    count, unit = num_microbatches(program, batch), program.batch_multiple
    return count, -(-batch // (count * program.mesh.size("dp") * unit)) * unit


def uses_numbers(program: Program) -> bool:
    """Whether a program depends on which sequences of the batch its part has."""
    return any(
        symbol(FIRST) in getattr(value, "free_symbols", ())
        for node in program.graph.nodes
        for value in torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    )


def part_of(program: Program, inputs: Mapping[str, torch.Tensor], part: Part) -> Inputs:
    """What a part has of whole inputs, by placeholder name."""
    types = {n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"}
    taken = {}
    for placeholder, name in program.placeholders.items():
        tensor, shape = inputs[name], types[placeholder].shape
        for dim, size in enumerate(shape):
            if size == symbol(PART):
                tensor = tensor.narrow(dim, part.first, part.count)
        taken[placeholder] = tensor
    return taken


def whole_outputs(
    program: Program,
    everyones: Sequence[Sequence[Sequence[Share]]],
    dealt: Deal,
    last: int | None = None,
) -> Any:
    """The outputs for the whole batch, nested as the model returns them.

    Args:
        program: that of the last rank, which is one of the last stage.
        everyones: for each rank, of each of its microbatches, its share of every output.
        dealt: of the run.
        last: the number of last positions that were kept; None for all.
    """
    assert program.mesh is not None
    parts = [
        (part, [runs[i] for runs in replica])
        for replica, hand in zip(by_replica(program.mesh, everyones), dealt.hands, strict=True)
        for i, part in enumerate(hand)
    ]
    return program.output_structure.build([
        _whole(program, i, [(part, [share[i] for share in shares]) for part, shares in parts],
               dealt.lengths, last)
        for i in range(len(program.outputs))
    ])


def _whole(
    program: Program,
    index: int,
    parts: Sequence[tuple[Part, Sequence[Share]]],
    lengths: Mapping[str, int],
    last: int | None,
) -> torch.Tensor:
    """One output for the whole batch; parts that lie side by side go right to their places."""
    dim = _batch_dim(program, index)
    if len(parts) == 1 or dim is None:
        made = [assembled(program, index, shares, part.lengths, last) for part, shares in parts]
        return _joined(program.returns[index], made, lengths) if program.returns else made[0]
    _, (like, *_) = parts[0]
    shape = shape_of(program, index, lengths, last)
    whole, start = torch.empty(shape, dtype=like.dtype, device=like.device), 0
    for part, shares in parts:
        size = int(bind(type_of(program.outputs[index]).shape[dim], part.lengths))
        place = whole.narrow(dim, start, size)
        assembled(program, index, shares, part.lengths, last, place)
        start += size
    return whole


def _batch_dim(program: Program, index: int) -> int | None:
    """The dim of an output that is the batch alone; None where there is none."""
    if not program.returns:
        return None
    dims = program.returns[index].layout.dims
    alone = [dim for dim, atoms in enumerate(dims) if len(atoms) == 1 and atoms[0].axes]
    return alone[0] if alone else None


def joined(
    program: Program, parts: Sequence[Sequence[torch.Tensor]], lengths: Mapping[str, int]
) -> list[torch.Tensor]:
    """Outputs of all parts along their batch dims; what has none is the same for all.

    Args:
        program: that of the last rank.
        parts: of each part, in order, every output: whole, or one rank's share of it.
        lengths: of the run.
    """
    if not program.returns:
        return list(parts[0])
    return [
        _joined(type_, [outputs[i] for outputs in parts], lengths)
        for i, type_ in enumerate(program.returns)
    ]


def _joined(
    type_: TensorType, parts: Sequence[torch.Tensor], lengths: Mapping[str, int]
) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    for dim, atoms in enumerate(type_.layout.dims):
        for place, atom in enumerate(atoms):
            if atom.axes:
                before = [int(bind(a.size, lengths)) for a in atoms[:place]]
                behind = [int(bind(a.size, lengths)) for a in atoms[place + 1 :]]
                opened = [part.unflatten(dim, (*before, -1, *behind)) if len(atoms) > 1 else part
                          for part in parts]
                whole = torch.cat(opened, dim + place)
                return whole.flatten(dim, dim + len(atoms) - 1) if len(atoms) > 1 else whole
    return parts[0]
