"""The cost of one rank's program: its steps in order, what they exchange, what it holds in memory.

Everything is read off the graph that is emitted for the rank, at a given length.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.ops import kernels_of
from ringcompile.cost.values import Values, bind_lengths, storages
from ringcompile.ir.communication import (
    COLLECTIVES,
    COMBINE,
    COMMUNICATION,
    SHIFT,
    WAIT,
    collective_bytes,
    short_name,
)
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh

PIPELINE = "pp"


@dataclass(frozen=True)
class Shift:
    """A transfer that a rank starts: what it sends to one peer, and whom it takes from.

    Attributes:
        channel: the mesh axis; transfers on one axis follow one another.
        to, source: global ranks.
        sent, taken: bytes.
    """

    channel: str
    to: int | None
    source: int | None
    sent: int
    taken: int


@dataclass(frozen=True)
class Collective:
    """An exchange among a group.

    Attributes:
        kind: the op's short name.
        channel: the mesh axes, as one text.
        group: global ranks.
        brought: bytes of this rank's operand.
    """

    kind: str
    channel: str
    group: tuple[int, ...]
    brought: int


@dataclass(frozen=True)
class Wait:
    """Waits for the transfer that a step started, given by the step's name."""

    of: str


@dataclass(frozen=True)
class Step:
    """A node that does something on its rank.

    Attributes:
        name: of the node.
        op: the short name of its operator.
        layer: of the model.
        kernels: what it launches, before it communicates if it does.
        communicates: what it exchanges.
        reads: names of the collectives whose results it is the first to read.
    """

    name: str
    op: str
    layer: str
    kernels: tuple[Kernel, ...]
    communicates: Shift | Collective | Wait | None = None
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankCost:
    """A rank's program as the timeline needs it.

    Attributes:
        rank: its number on the mesh.
        steps: in order.
        weights: names and bytes of its shares of the weights.
        peak_bytes: weights, inputs and values at the moment when they are most.
        num_nodes: calls of the program, views included: what a host that runs it node by node does.
    """

    rank: int
    steps: tuple[Step, ...]
    weights: tuple[tuple[str, int], ...]
    peak_bytes: int
    num_nodes: int

    @property
    def weight_bytes(self) -> int:
        """All of its shares of the weights."""
        return sum(num_bytes for _, num_bytes in self.weights)

    @property
    def flops(self) -> int:
        """Multiplications and additions of matrix products and of attention."""
        return sum(kernel.flops for step in self.steps for kernel in step.kernels)

    @property
    def bytes_sent(self) -> int:
        """What has to leave the rank, whatever the algorithm."""
        return sum(map(sent_by, self.steps))


def sent_by(step: Step) -> int:
    """The bytes that a step has to send, as `ir/communication.py` counts them."""
    match step.communicates:
        case Shift(sent=sent):
            return sent
        case Collective(kind, _, group, brought):
            return int(collective_bytes(kind, brought, len(group)))
    return 0


def cost_of(program: Program, length: int | None = None) -> RankCost:
    """Read the cost of a rank's program off its graph.

    Args:
        program: of one rank.
        length: of the whole sequence; None where the program fixes it.

    Raises:
        RingCompileError: the length does not fit the program, or an op is not known.
    """
    values = Values(program, bind_lengths(program, length))
    assert program.coordinates is not None
    mesh = program.mesh or Mesh(())
    rank = mesh.rank(program.coordinates)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    reads = _first_reads(nodes)
    steps = (_step(values, mesh, rank, node, reads.get(node, ())) for node in nodes)
    return RankCost(
        rank,
        tuple(s for s in steps if s.kernels or s.communicates or s.reads),
        _weights(values),
        _peak_bytes(values),
        len(nodes),
    )


def _step(
    values: Values, mesh: Mesh, rank: int, node: fx.Node, reads: tuple[str, ...]
) -> Step:
    name = str(node.target)
    op = name.split(".")[1] if "." in name else name
    return Step(
        node.name, op, location_of(node).layer, tuple(kernels_of(values, node)),
        _exchanged(values, mesh, rank, node) if name in COMMUNICATION else None, reads,
    )


def _exchanged(
    values: Values, mesh: Mesh, rank: int, node: fx.Node
) -> Shift | Collective | Wait:
    target, operand = str(node.target), node.args[0]
    if target == WAIT:
        assert isinstance(operand, fx.Node)
        return Wait(operand.name)
    channel = str(node.kwargs["axis"])
    # As many rows come back from experts as went to them.
    moved = node if target == COMBINE else operand
    brought = _num_bytes(values.tensor(moved)) if isinstance(moved, fx.Node) else 0
    if target != SHIFT:
        return Collective(short_name(node), channel, tuple(mesh.group_of(rank, channel)), brought)
    to, source = (_peer(mesh, rank, channel, node.kwargs[key]) for key in ("to", "source"))
    return Shift(
        channel, to, source, brought if to is not None else 0,
        _num_bytes(values.tensor(node)) if source is not None else 0,
    )


def _peer(mesh: Mesh, rank: int, axis: str, coordinate: object) -> int | None:
    if coordinate is None:
        return None
    assert isinstance(coordinate, int)
    return mesh.rank({**mesh.coordinates(rank), axis: coordinate})


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _first_reads(nodes: list[fx.Node]) -> Mapping[fx.Node, tuple[str, ...]]:
    """For each node, the collectives whose results no node before it needs in memory."""
    pending: dict[fx.Node, str] = {}  # a collective's result, and views of it
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in nodes:
        read = dict.fromkeys(pending[n] for n in node.all_input_nodes if n in pending)
        if read and node.target is operator.getitem:
            pending[node] = next(iter(read))
            continue
        if read:
            found[node] = tuple(read)
            pending = {n: name for n, name in pending.items() if name not in read}
        target = str(node.target)
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


def _peak_bytes(values: Values) -> int:
    """Memory is freed behind the last node that reads it, or a view of it; weights stay."""
    frees = _frees(values)
    held: dict[int, int] = {}
    now = peak = 0
    for i, node in enumerate(values.of):
        for identity, num_bytes in storages(values.of[node]):
            if identity not in held:
                held[identity] = num_bytes
                now += num_bytes
        peak = max(peak, now)
        now -= sum(held[identity] for identity in frees.get(i, ()))
    return peak


def _frees(values: Values) -> dict[int, list[int]]:
    """What memory is freed behind which node, by its place; a transfer holds what it sends."""
    last: dict[int, int] = {}
    for i, node in enumerate(values.of):
        read = [node, *node.all_input_nodes]
        if str(node.target) == WAIT:
            started = node.args[0]
            assert isinstance(started, fx.Node)
            read += started.all_input_nodes
        for operand in read:
            last.update((identity, i) for identity, _ in storages(values.of[operand]))
    kept = [n for n in values.of if n.name in values.program.weights] + list(values.program.outputs)
    for node in kept:
        for identity, _ in storages(values.of[node]):
            last.pop(identity, None)
    frees: dict[int, list[int]] = {}
    for identity, i in last.items():
        frees.setdefault(i, []).append(identity)
    return frees
