"""The cost of one rank's program: its steps in order, their communication, and its memory.

Everything is derived from the graph that is emitted for the rank, at a given length.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import fx

from ringcompile.cost.fusing import AcrossBlocks, fused
from ringcompile.cost.kernels import Kernel
from ringcompile.cost.ops import kernels_of
from ringcompile.cost.values import Values, bind_lengths, storages
from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import (
    COLLECTIVES,
    COMBINE,
    COMMUNICATION,
    SHIFT,
    WAIT,
    collective_bytes,
    short_name,
)
from ringcompile.ir.fused import units_of
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.ir.state import KEPT
from ringcompile.mesh import Mesh

PIPELINE = "pp"


@dataclass(frozen=True)
class TimedShift:
    """A transfer that a rank starts: it sends to one peer and receives from another.

    Attributes:
        channel: the mesh axis; transfers on one axis follow one another.
        to, source: global ranks.
        sent, taken: the number of bytes sent and received.
    """

    channel: str
    to: int | None
    source: int | None
    sent: int
    taken: int


@dataclass(frozen=True)
class TimedCollective:
    """A collective over a group of ranks.

    Attributes:
        kind: the short name of the op.
        channel: the mesh axes, as one text.
        group: the global ranks that take part.
        brought: the bytes of this rank's operand.
    """

    kind: str
    channel: str
    group: tuple[int, ...]
    brought: int


@dataclass(frozen=True)
class TimedWait:
    """A wait for the transfer that the step of this name started."""

    of: str


# What a step does to other ranks.
Exchange: TypeAlias = TimedShift | TimedCollective | TimedWait


@dataclass(frozen=True)
class TimedStep:
    """A node that computes or communicates.

    Attributes:
        name: the name of the node.
        op: the short name of its operator.
        layer: the module path.
        kernels: the kernels that it launches, before any communication.
        communicates: its communication, if it has any.
        reads: the collectives whose results it is the first to read, by name.
        across: of a fused group with nodes in several blocks of the model.
    """

    name: str
    op: str
    layer: str
    kernels: tuple[Kernel, ...]
    communicates: Exchange | None = None
    reads: tuple[str, ...] = ()
    across: AcrossBlocks | None = None


@dataclass(frozen=True)
class RankCost:
    """A rank's program in the form that the timeline needs.

    Attributes:
        rank: its number on the mesh.
        steps: the steps in order.
        weights: the names and bytes of its shares of the weights.
        peak_bytes: its peak memory: weights, inputs, values, and what it keeps of a sequence.
        num_nodes: the number of calls that a host runs, views included; a fused group is one.
        held: for each node by name, the bytes that the rank holds while it runs.
        caches: what it keeps of earlier tokens: module paths and bytes.
    """

    rank: int
    steps: tuple[TimedStep, ...]
    weights: tuple[tuple[str, int], ...]
    peak_bytes: int
    num_nodes: int
    held: Mapping[str, int] = field(default_factory=dict, compare=False)
    caches: tuple[tuple[str, int], ...] = ()

    @property
    def cache_bytes(self) -> int:
        """The bytes of keys, values and sums that it keeps from call to call."""
        return sum(num_bytes for _, num_bytes in self.caches)

    @property
    def weight_bytes(self) -> int:
        """The bytes of its shares of all weights."""
        return sum(num_bytes for _, num_bytes in self.weights)

    @property
    def flops(self) -> int:
        """The FLOPs of matmuls and attention."""
        return sum(kernel.flops for step in self.steps for kernel in step.kernels)

    @property
    def bytes_sent(self) -> int:
        """The bytes that the rank sends, by the minimum that any algorithm needs."""
        return sum(map(sent_by, self.steps))


def sent_by(step: TimedStep) -> int:
    """The bytes that a step sends, counted as in `ir/communication.py`."""
    match step.communicates:
        case TimedShift(sent=sent):
            return sent
        case TimedCollective(kind, _, group, brought):
            return int(collective_bytes(kind, brought, len(group)))
    return 0


def cost_of(
    program: Program, length: int | None = None, batch: int | None = None,
    context: int | None = None,
) -> RankCost:
    """Compute the cost of a rank's program from its graph.

    Args:
        program: of one rank.
        length: of the whole sequence; None where the program fixes it.
        batch: sequences that the program runs at a time; None for the fewest.
        context: as for `bind_lengths`.

    Raises:
        RingCompileError: the length does not fit the program, or an op is not known.
    """
    values = Values(program, bind_lengths(program, length, batch, context))
    assert program.coordinates is not None
    mesh = program.mesh or Mesh(())
    rank = mesh.rank(program.coordinates)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    reads = _first_reads(nodes)
    held = _held_bytes(values)
    kernels, across = fused(values, {n: kernels_of(values, n) for n in nodes})
    steps = (
        _step(
            values, mesh, rank, node, kernels[node], reads.get(node, ()), across.get(node)
        )
        for node in nodes
    )
    return RankCost(
        rank,
        tuple(s for s in steps if s.kernels or s.communicates or s.reads),
        _weights(values),
        max(held.values(), default=0),
        len(units_of(nodes)),
        held,
        tuple(
            (location_of(next(iter(node.users), node)).layer, _num_bytes(values.tensor(node)))
            for node in program.graph.nodes if program.state.get(node.name) in KEPT
        ),
    )


def _step(
    values: Values, mesh: Mesh, rank: int, node: fx.Node, kernels: Sequence[Kernel],
    reads: tuple[str, ...], across: AcrossBlocks | None,
) -> TimedStep:
    name = target_name(node.target)
    op = name.split(".")[1] if "." in name else name
    return TimedStep(
        node.name, op, location_of(node).layer, tuple(kernels),
        _exchanged(values, mesh, rank, node) if name in COMMUNICATION else None, reads, across,
    )


def _exchanged(
    values: Values, mesh: Mesh, rank: int, node: fx.Node
) -> Exchange:
    target, operand = target_name(node.target), node.args[0]
    if target == WAIT:
        assert isinstance(operand, fx.Node)
        return TimedWait(operand.name)
    channel = str(node.kwargs["axis"])
    # As many rows come back from experts as went to them.
    moved = node if target == COMBINE else operand
    brought = _num_bytes(values.tensor(moved)) if isinstance(moved, fx.Node) else 0
    if target != SHIFT:
        group = tuple(mesh.group_of(rank, channel))
        return TimedCollective(short_name(node), channel, group, brought)
    to, source = (_peer(mesh, rank, channel, node.kwargs[key]) for key in ("to", "source"))
    return TimedShift(
        channel, to, source, brought if to is not None else 0,
        _num_bytes(values.tensor(node)) if source is not None else 0,
    )


def _peer(mesh: Mesh, rank: int, axis: str, coordinate: object) -> int | None:
    if coordinate is None:
        return None
    assert isinstance(coordinate, int)
    return mesh.peer(rank, axis, coordinate)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _first_reads(nodes: list[fx.Node]) -> Mapping[fx.Node, tuple[str, ...]]:
    """For each node, the collectives whose results it is the first to read."""
    pending: dict[fx.Node, str] = {}  # a collective's result, and views of it
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in nodes:
        inputs = node.all_input_nodes if pending else ()
        read = dict.fromkeys(pending[n] for n in inputs if n in pending)
        if read and node.target is operator.getitem:
            pending[node] = next(iter(read))
            continue
        if read:
            found[node] = tuple(read)
            pending = {n: name for n, name in pending.items() if name not in read}
        target = target_name(node.target)
        if target in COLLECTIVES:
            pending[node] = node.name
    return found


def _weights(values: Values) -> tuple[tuple[str, int], ...]:
    program = values.program
    return tuple(
        (program.weights[node.name].name, _num_bytes(values.tensor(node)))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.weights
    )


def _held_bytes(values: Values) -> dict[str, int]:
    """The memory while each node runs; a value is freed behind the last reader of it or a view."""
    memory = {node: tuple(storages(value)) for node, value in values.of.items()}
    frees = _frees(values, memory)
    held: dict[int, int] = {}
    now, found = 0, dict[str, int]()
    for i, node in enumerate(values.of):
        for identity, num_bytes in memory[node]:
            if identity not in held:
                held[identity] = num_bytes
                now += num_bytes
        found[node.name] = now
        now -= sum(held[identity] for identity in frees.get(i, ()))
    return found


def _frees(
    values: Values, memory: Mapping[fx.Node, tuple[tuple[int, int], ...]]
) -> dict[int, list[int]]:
    """The memory that is freed after each node; a transfer keeps what it sends until its wait.

    Args:
        values: of the program.
        memory: the `storages` of each value.
    """
    last: dict[int, int] = {}
    for i, node in enumerate(values.of):
        read = [node, *node.all_input_nodes]
        if target_name(node.target) == WAIT:
            started = node.args[0]
            assert isinstance(started, fx.Node)
            read += started.all_input_nodes
        for operand in read:
            for identity, _ in memory[operand]:
                last[identity] = i
    program = values.program
    kept = [n for n in values.of if n.name in program.weights or program.state.get(n.name) in KEPT]
    kept += program.outputs
    for node in kept:
        for identity, _ in memory[node]:
            last.pop(identity, None)
    frees: dict[int, list[int]] = {}
    for identity, i in last.items():
        frees.setdefault(i, []).append(identity)
    return frees
