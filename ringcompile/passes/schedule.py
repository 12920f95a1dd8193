"""Order a rank's program so that transfers start early and are waited for late.

The order of a graph is the order in which kernels run, and a transfer starts when what stands
before it is done. A list scheduler rewrites it: time goes by on a compute stream and on a channel
for each mesh axis, and at every moment the node that brings the next transfer nearer is taken, or
else any that need not wait. What ranks exchange keeps its order, so that they still fit together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from ringcompile.ir.communication import COLLECTIVES, SHIFT, WAIT
from ringcompile.ir.program import Program
from ringcompile.passes.base import Builder, Pass

# Seconds of a node by its name: of its kernels, and of what it exchanges.
Times = Mapping[str, tuple[float, float]]


def _no_times(program: Program) -> Times:
    """Where nothing is known of times, a transfer is waited for when nothing else is left."""
    return {}


@dataclass(frozen=True)
class Schedule(Pass):
    """Reorder one rank's program; nothing is added, left out or exchanged in another order.

        q = linear(x, wq); k = linear(x, wk); t = shift_start(k); o = block_attention(q, k)
    ->  k = linear(x, wk); t = shift_start(k); q = linear(x, wq); o = block_attention(q, k)

    Attributes:
        times: the seconds of a program's nodes on some hardware.
        rounds: whether two halves of a batch take turns at exchanging, one attention or collective
            each; otherwise what is exchanged stays in the order of the program.
    """

    name: ClassVar[str] = "schedule"
    times: Callable[[Program], Times] = field(default=_no_times, repr=False)
    rounds: bool = False

    def run(self, program: Program) -> Program:
        """Copy all nodes in the new order."""
        nodes = list(program.graph.nodes)
        calls = [node for node in nodes if node.op == "call_function"]
        exchanges = _exchanges(calls)
        if self.rounds:
            exchanges = _in_rounds(exchanges, calls)
        order = _Order(calls, exchanges, self.times(program)).find()
        builder = Builder()
        for node in (*(n for n in nodes if n.op == "placeholder"), *order, program.output_node):
            builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


def _exchanges(calls: list[fx.Node]) -> list[fx.Node]:
    """What ranks must do in one order: starts of transfers, and collectives."""
    return [node for node in calls if str(node.target) == SHIFT or str(node.target) in COLLECTIVES]


def _in_rounds(exchanges: list[fx.Node], calls: list[fx.Node]) -> list[fx.Node]:
    """First the first half's first attention or collective, then the second's, and so on.

    All transfers of one attention belong together. That is read off names that all ranks share:
    `of` names the attention, and a copy's name ends in its half.
    """
    places = {node.name: i for i, node in enumerate(calls)}

    def event(node: fx.Node) -> str:
        return str(node.kwargs["of"]) if str(node.target) == SHIFT else node.name

    events = sorted({event(node) for node in exchanges}, key=lambda name: places.get(name, 0))
    seen: dict[str, int] = {}
    keys = {}
    for name in events:
        half = half_of(name)
        seen[half] = keys[name] = seen.get(half, -1) + 1
    return sorted(exchanges, key=lambda node: (keys[event(node)], half_of(event(node))))


def half_of(name: str) -> str:
    """Which half of a batch a node belongs to, from its name; empty for those that are shared."""
    found = [part for part in name.split("_") if part in ("half0", "half1")]
    return found[0] if found else ""


class _Order:
    """A list scheduler for one program.

    Args:
        calls: all calls, in an order that is possible.
        exchanges: those that have to keep their order.
        times: see `Schedule`.
    """

    def __init__(self, calls: list[fx.Node], exchanges: list[fx.Node], times: Times) -> None:
        self.place = {node: i for i, node in enumerate(calls)}
        self.exchanges, self.times = exchanges, times
        self.missing = {
            node: sum(operand in self.place for operand in node.all_input_nodes) for node in calls
        }
        self.ready = {node for node, count in self.missing.items() if not count}
        self.order: list[fx.Node] = []
        self.now = 0.0
        self.free: dict[str, float] = {}
        self.arrives: dict[fx.Node, float] = {}
        self.wanted: set[fx.Node] = set()
        self.next = 0
        self._look_ahead()

    def find(self) -> list[fx.Node]:
        """The new order."""
        while self.ready:
            self._take(self._choose())
        assert len(self.order) == len(self.place)
        return self.order

    def _choose(self) -> fx.Node:
        if self.next < len(self.exchanges) and self.exchanges[self.next] in self.ready:
            return self.exchanges[self.next]
        able = [node for node in self.ready if node not in self._later]
        at_once = [node for node in able if self._stalls(node) <= 0]
        if not at_once:
            return min(able, key=lambda node: (self._stalls(node), self.place[node]))
        return min(at_once, key=lambda node: (node not in self.wanted, self.place[node]))

    @property
    def _later(self) -> set[fx.Node]:
        """Exchanges whose turn has not come."""
        return set(self.exchanges[self.next + 1 :]) & self.ready

    def _stalls(self, node: fx.Node) -> float:
        """How long the compute would stand still for what the node reads."""
        arrivals = [self.arrives[n] for n in node.all_input_nodes if n in self.arrives]
        return max(arrivals, default=self.now) - self.now

    def _take(self, node: fx.Node) -> None:
        target = str(node.target)
        seconds, on_the_way = self.times.get(node.name, (0.0, 0.0))
        self.now += seconds
        if node in self.exchanges[self.next : self.next + 1]:
            axis = str(node.kwargs["axis"])
            # Where no time is known, a transfer takes until there is nothing else to do.
            takes = on_the_way if self.times else float("inf")
            self.arrives[node] = max(self.now, self.free.get(axis, 0.0)) + takes
            self.free[axis] = self.arrives[node] if self.times else 0.0
            self.next += 1
            self._look_ahead()
        elif target == WAIT or any(n in self.arrives for n in node.all_input_nodes):
            self._arrived(node)
        self.order.append(node)
        self.ready.discard(node)
        for user in node.users:
            if user in self.missing:
                self.missing[user] -= sum(n is node for n in user.all_input_nodes)
                if not self.missing[user]:
                    self.ready.add(user)

    def _arrived(self, node: fx.Node) -> None:
        """The compute has waited for what this node reads; others need not wait for it again."""
        for operand in node.all_input_nodes:
            moment = self.arrives.pop(operand, None)
            if moment is not None and self.times:
                self.now = max(self.now, moment)

    def _look_ahead(self) -> None:
        """What the next exchange needs, directly or not."""
        self.wanted = set()
        waiting = [self.exchanges[self.next]] if self.next < len(self.exchanges) else []
        done = set(self.order)
        while waiting:
            node = waiting.pop()
            for operand in node.all_input_nodes:
                if operand in self.place and operand not in done and operand not in self.wanted:
                    self.wanted.add(operand)
                    waiting.append(operand)
