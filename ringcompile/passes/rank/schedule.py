"""Order a rank's program so that transfers start early and are waited for late.

The order of a graph is the order in which kernels run, and a transfer starts when what stands
before it is done. A list scheduler rewrites it: time goes by on a compute stream and on a channel
for each mesh axis, and at every moment the node that brings the next transfer nearer is taken, or
else any that need not wait. The nodes of a fused group are taken together. What ranks exchange
keeps its order, so that they still fit together; messages from one rank are waited for in the order
of their starts.

A rank of a ring sends its own keys only, so it could start all transfers of an attention at once,
and would hold all keys that it sees. How many of them may be under way is chosen by the times: the
fewest with which the program takes as long as with twice as many, to within one part in a hundred.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

from torch import fx

from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import COLLECTIVES, SHIFT, WAIT
from ringcompile.ir.fused import units_of
from ringcompile.ir.program import Program
from ringcompile.passes.base import Builder, Pass

# How many transfers of one attention are under way at least, and what share of the time it has to
# come to with more of them.
_FEWEST, _AS_FAST = 2, 0.99
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
        order = _shallowest(calls, self.times(program))
        builder = Builder()
        for node in (
            *(n for n in nodes if n.op == "placeholder"), *order.nodes, program.output_node
        ):
            builder.env[node] = new = builder.copy(node)
            if order.of_one[_attention(node)] > 1:
                new.meta["why"] = f"at most {order.most} of them under way"
        return program.with_graph(builder.graph)


def _shallowest(calls: list[fx.Node], times: Times) -> _Order:
    """The order with the fewest transfers of one attention under way that is not slower."""
    found = _Order(calls, times, _FEWEST).find()
    while found.most < max(found.of_one.values(), default=0):
        more = _Order(calls, times, 2 * found.most).find()
        if more.now >= _AS_FAST * found.now:
            break
        found = more
    return found


def _attention(node: fx.Node) -> str | None:
    """The attention that a transfer brings keys and values for; None for other nodes."""
    if target_name(node.target) != SHIFT or node.kwargs["source"] is None:
        return None
    return str(node.kwargs["of"])


class _Unit:
    """A node, or the nodes of a fused group."""

    def __init__(self, place: int, nodes: list[fx.Node]) -> None:
        self.place, self.nodes, self.first = place, nodes, nodes[0]
        inside = set(nodes)
        self.reads = [x for node in nodes for x in node.all_input_nodes if x not in inside]


class _Order:
    """A list scheduler for one program.

    Args:
        calls: all calls, in an order that is possible.
        times: see `Schedule`.
        most: how many transfers of one attention may be under way.
    """

    def __init__(self, calls: list[fx.Node], times: Times, most: int) -> None:
        self.most = most
        self.of_one: Counter[str | None] = Counter(filter(None, map(_attention, calls)))
        self.under_way: Counter[str | None] = Counter()
        self.units = [_Unit(i, nodes) for i, nodes in enumerate(units_of(calls))]
        self.unit_of = {node: unit for unit in self.units for node in unit.nodes}
        self.times = times
        # What ranks must do in one order: starts of transfers, and collectives.
        self.exchanges = deque(
            unit for unit in self.units if target_name(unit.first.target) in COLLECTIVES | {SHIFT}
        )
        self.missing = {
            unit: sum(node in self.unit_of for node in dict.fromkeys(unit.reads))
            for unit in self.units
        }
        self.ready = {unit for unit, count in self.missing.items() if not count}
        self.order: list[_Unit] = []
        self.left = set(self.units)
        self.now = 0.0
        self.free: dict[str, float] = {}
        self.arrives: dict[fx.Node, float] = {}
        # Messages on their way, by axis and sender: they arrive in the order of their starts.
        self.coming: dict[tuple[Any, Any], deque[fx.Node]] = {}
        self.wanted: set[_Unit] = set()
        self._look_ahead()

    def find(self) -> _Order:
        """Find the new order, `order`, and the seconds that it takes, `now`."""
        while self.ready:
            self._take(self._choose())
        assert len(self.order) == len(self.units)
        return self

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in the new order."""
        return [node for unit in self.order for node in unit.nodes]

    def _choose(self) -> _Unit:
        if self.exchanges and self.exchanges[0] in self.ready and not self._is_full():
            return self.exchanges[0]
        able = [unit for unit in self.ready if self._has_its_turn(unit.first)]
        at_once = [unit for unit in able if self._stalls(unit) <= 0]
        if not at_once:
            return min(able, key=lambda unit: (self._stalls(unit), unit.place))
        return min(at_once, key=lambda unit: (unit not in self.wanted, unit.place))

    def _is_full(self) -> bool:
        """Whether something has to arrive before the next transfer starts."""
        return self.under_way[_attention(self.exchanges[0].first)] >= self.most

    def _has_its_turn(self, node: fx.Node) -> bool:
        """Exchanges come one after the other, and so do messages from one rank."""
        if target_name(node.target) != WAIT:
            return target_name(node.target) not in COLLECTIVES | {SHIFT}
        started = node.args[0]
        queue = self.coming.get(_sender(started))
        return not queue or queue[0] is started

    def _stalls(self, unit: _Unit) -> float:
        """How long the compute would stand still for what the unit reads."""
        arrivals = [self.arrives[n] for n in unit.reads if n in self.arrives]
        return max(arrivals, default=self.now) - self.now

    def _take(self, unit: _Unit) -> None:
        known = [self.times.get(node.name, (0.0, 0.0)) for node in unit.nodes]
        self.now += sum(seconds for seconds, _ in known)
        if self.exchanges and unit is self.exchanges[0]:
            self._start(unit.first, known[0][1])
        else:
            self._arrived(unit)
        self.order.append(unit)
        self.left.discard(unit)
        self.ready.discard(unit)
        readers = [(self.unit_of[u], n) for n in unit.nodes for u in n.users if u in self.unit_of]
        for reader, _ in dict.fromkeys(pair for pair in readers if pair[0] is not unit):
            self.missing[reader] -= 1
            if not self.missing[reader]:
                self.ready.add(reader)

    def _start(self, node: fx.Node, seconds: float) -> None:
        """Put an exchange on its channel."""
        axis = str(node.kwargs["axis"])
        # Where no time is known, a transfer takes until there is nothing else to do.
        begins = max(self.now, self.free.get(axis, 0.0)) if self.times else inf
        self.arrives[node] = begins + seconds
        self.free[axis] = self.arrives[node]
        if target_name(node.target) == SHIFT and node.kwargs["source"] is not None:
            self.coming.setdefault(_sender(node), deque()).append(node)
            self.under_way[_attention(node)] += 1
        self.exchanges.popleft()
        self._look_ahead()

    def _arrived(self, unit: _Unit) -> None:
        """The compute has waited for what this unit reads; others need not wait for it again."""
        for operand in dict.fromkeys(unit.reads):
            moment = self.arrives.pop(operand, None)
            if moment is None:
                continue
            self.now = max(self.now, moment) if self.times else self.now
            queue = self.coming.get(_sender(operand))
            if queue and queue[0] is operand:
                queue.popleft()
                self.under_way[_attention(operand)] -= 1

    def _look_ahead(self) -> None:
        """What the next exchange needs, directly or not."""
        self.wanted = set()
        waiting = [self.exchanges[0]] if self.exchanges else []
        while waiting:
            read = (self.unit_of[x] for x in waiting.pop().reads if x in self.unit_of)
            for unit in read:
                if unit in self.left and unit not in self.wanted:
                    self.wanted.add(unit)
                    waiting.append(unit)


def _sender(node: Any) -> tuple[Any, Any]:
    """The axis of an exchange and, of a transfer, whom it takes from."""
    return node.kwargs["axis"], node.kwargs.get("source")
