"""Order a rank's program so that transfers start early and are waited for late.

The order of a graph is the order in which kernels run, and a transfer starts when what stands
before it is done. A list scheduler rewrites it: time goes by on a compute stream and on a channel
for each mesh axis, and at every moment the node that brings the next transfer nearer is taken, or
else any that need not wait. What ranks exchange keeps its order, so that they still fit together;
messages from one rank are waited for in the order of their starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

from torch import fx

from ringcompile.ir.calls import target_name
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
    """

    name: ClassVar[str] = "schedule"
    times: Callable[[Program], Times] = field(default=_no_times, repr=False)

    def run(self, program: Program) -> Program:
        """Copy all nodes in the new order."""
        nodes = list(program.graph.nodes)
        calls = [node for node in nodes if node.op == "call_function"]
        order = _Order(calls, self.times(program)).find()
        builder = Builder()
        for node in (*(n for n in nodes if n.op == "placeholder"), *order, program.output_node):
            builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


class _Order:
    """A list scheduler for one program.

    Args:
        calls: all calls, in an order that is possible.
        times: see `Schedule`.
    """

    def __init__(self, calls: list[fx.Node], times: Times) -> None:
        self.place = {node: i for i, node in enumerate(calls)}
        self.times = times
        # What ranks must do in one order: starts of transfers, and collectives.
        self.exchanges = deque(n for n in calls if target_name(n.target) in COLLECTIVES | {SHIFT})
        self.missing = {
            node: sum(operand in self.place for operand in node.all_input_nodes) for node in calls
        }
        self.ready = {node for node, count in self.missing.items() if not count}
        self.order: list[fx.Node] = []
        self.now = 0.0
        self.free: dict[str, float] = {}
        self.arrives: dict[fx.Node, float] = {}
        # Messages on their way, by axis and sender: they arrive in the order of their starts.
        self.coming: dict[tuple[Any, Any], deque[fx.Node]] = {}
        self.wanted: set[fx.Node] = set()
        self._look_ahead()

    def find(self) -> list[fx.Node]:
        """The new order."""
        while self.ready:
            self._take(self._choose())
        assert len(self.order) == len(self.place)
        return self.order

    def _choose(self) -> fx.Node:
        if self.exchanges and self.exchanges[0] in self.ready:
            return self.exchanges[0]
        able = [node for node in self.ready if self._has_its_turn(node)]
        at_once = [node for node in able if self._stalls(node) <= 0]
        if not at_once:
            return min(able, key=lambda node: (self._stalls(node), self.place[node]))
        return min(at_once, key=lambda node: (node not in self.wanted, self.place[node]))

    def _has_its_turn(self, node: fx.Node) -> bool:
        """Exchanges come one after the other, and so do messages from one rank."""
        if target_name(node.target) != WAIT:
            return target_name(node.target) not in COLLECTIVES | {SHIFT}
        started = node.args[0]
        queue = self.coming.get(_sender(started))
        return not queue or queue[0] is started

    def _stalls(self, node: fx.Node) -> float:
        """How long the compute would stand still for what the node reads."""
        arrivals = [self.arrives[n] for n in node.all_input_nodes if n in self.arrives]
        return max(arrivals, default=self.now) - self.now

    def _take(self, node: fx.Node) -> None:
        seconds, on_the_way = self.times.get(node.name, (0.0, 0.0))
        self.now += seconds
        if self.exchanges and node is self.exchanges[0]:
            self._start(node, on_the_way)
        else:
            self._arrived(node)
        self.order.append(node)
        self.ready.discard(node)
        for user in node.users:
            if user in self.missing:
                self.missing[user] -= sum(n is node for n in user.all_input_nodes)
                if not self.missing[user]:
                    self.ready.add(user)

    def _start(self, node: fx.Node, seconds: float) -> None:
        """Put an exchange on its channel."""
        axis = str(node.kwargs["axis"])
        # Where no time is known, a transfer takes until there is nothing else to do.
        begins = max(self.now, self.free.get(axis, 0.0)) if self.times else inf
        self.arrives[node] = begins + seconds
        self.free[axis] = self.arrives[node]
        if target_name(node.target) == SHIFT and node.kwargs["source"] is not None:
            self.coming.setdefault(_sender(node), deque()).append(node)
        self.exchanges.popleft()
        self._look_ahead()

    def _arrived(self, node: fx.Node) -> None:
        """The compute has waited for what this node reads; others need not wait for it again."""
        for operand in node.all_input_nodes:
            moment = self.arrives.pop(operand, None)
            if moment is None:
                continue
            self.now = max(self.now, moment) if self.times else self.now
            queue = self.coming.get(_sender(operand))
            if queue and queue[0] is operand:
                queue.popleft()

    def _look_ahead(self) -> None:
        """What the next exchange needs, directly or not."""
        self.wanted = set()
        waiting = [self.exchanges[0]] if self.exchanges else []
        done = set(self.order)
        while waiting:
            node = waiting.pop()
            for operand in node.all_input_nodes:
                if operand in self.place and operand not in done and operand not in self.wanted:
                    self.wanted.add(operand)
                    waiting.append(operand)


def _sender(node: Any) -> tuple[Any, Any]:
    """The axis of an exchange and, of a transfer, whom it takes from."""
    return node.kwargs["axis"], node.kwargs.get("source")
