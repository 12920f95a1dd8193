"""Layers that repeat: a program cut to a few of them, and a rank's cost with them repeated again.

A plan for 80 equal layers is costed from one. That layers are equal is seen in the captured graph:
the same ops on the same shapes, reading the layer before in the same places.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import fx

from ringcompile.cost.rank import PIPELINE, RankCost, Shift, Step, Wait
from ringcompile.ir.calls import append, map_values
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import format_type

_INDEX = re.compile(r"^(?P<stack>[^0-9.][^.]*(?:\.[^0-9.][^.]*)*)\.(?P<index>\d+)(?:\.|$)")


@dataclass(frozen=True)
class Stack:
    """The layers of a model that all look alike.

    Attributes:
        name: their common module path, such as "model.layers".
        count: how many there are.
        layer_bytes: of the weights of one.
    """

    name: str
    count: int
    layer_bytes: int = 0

    def index(self, layer: str) -> int | None:
        """Which of the layers a module path lies in."""
        found = _INDEX.match(layer)
        return int(found["index"]) if found and found["stack"] == self.name else None


def find_stack(program: Program) -> Stack | None:
    """The stack of equal layers that most of a captured program is; None where layers differ."""
    paths = (_INDEX.match(location_of(n).layer) for n in program.graph.nodes)
    counts = Counter(found["stack"] for found in paths if found)
    if not counts:
        return None
    name = counts.most_common(1)[0][0]
    groups = _groups(program, Stack(name, 0))
    texts = [_signature(groups, i) for i in range(len(groups))]
    alike = len(groups) > 1 and len(set(texts[1:])) == 1
    inner = alike and _signature(groups, 0, inner=True) == _signature(groups, 1, inner=True)
    if not inner:
        return None
    held = [w.num_bytes for w in program.weights.values() if Stack(name, 0).index(w.name) == 0]
    return Stack(name, len(groups), sum(held))


def cut(program: Program, stack: Stack, count: int) -> Program:
    """The program with the first `count` of the stack's layers only.

    What came behind the last layer reads the last one that is kept.
    """
    groups = _groups(program, stack)
    if count >= len(groups):
        return program
    dropped = {node for group in groups[count:] for node in group}
    stands_in = dict(zip(groups[-1], groups[count - 1], strict=True))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        unread = node.op == "placeholder" and node.users and all(u in dropped for u in node.users)
        if node in dropped or unread:
            continue
        args, kwargs = map_values(
            (node.args, dict(node.kwargs)),
            lambda v: env[stands_in.get(v, v)] if isinstance(v, fx.Node) else v,
        )
        env[node] = append(graph, node.op, node.target, args, kwargs, node.name)
        env[node].meta.update(node.meta)
    names = {node.name for node in graph.nodes if node.op == "placeholder"}
    return program.with_graph(
        graph,
        weights={k: v for k, v in program.weights.items() if k in names},
        placeholders={k: v for k, v in program.placeholders.items() if k in names},
    )


def repeat(cost: RankCost, stack: Stack, times: int) -> RankCost:
    """The cost with each of the rank's layers of a stack repeated.

    Args:
        cost: of a program with one layer, or with one for each stage of a pipeline.
        stack: its layers.
        times: how often each layer is there in the whole model.
    """
    steps: list[Step] = []
    between = {step.name for step in cost.steps if _crosses(step)}
    between |= {step.name for step in cost.steps
                if isinstance(step.communicates, Wait) and step.communicates.of in between}
    runs = groupby(
        cost.steps,
        key=lambda step: stack.index(step.layer) is not None and step.name not in between,
    )
    repeated = _joined([(inside, list(run)) for inside, run in runs])
    for inside, run in repeated:
        steps += [_renamed(step, i) for i in range(times) for step in run] if inside else run
    nodes = cost.num_nodes * len(steps) // max(len(cost.steps), 1)
    more = [w for w in cost.weights if stack.index(w[0]) is not None] * (times - 1)
    return replace(cost, steps=tuple(steps), num_nodes=nodes, weights=(*cost.weights, *more),
                   peak_bytes=cost.peak_bytes + sum(num_bytes for _, num_bytes in more))


def _crosses(step: Step) -> bool:
    """Whether a step hands on to another stage, or takes: once, however many layers there are."""
    return isinstance(step.communicates, Shift) and step.communicates.channel == PIPELINE


def _joined(runs: list[tuple[bool, list[Step]]]) -> list[tuple[bool, list[Step]]]:
    """From the first step inside to the last one all is one run; shared steps first."""
    inside = [i for i, (flag, _) in enumerate(runs) if flag]
    if not inside:
        return runs
    first, last = inside[0], inside[-1]
    layer = [step for flag, run in runs[first : last + 1] if flag for step in run]
    shared = [step for flag, run in runs[first : last + 1] if not flag for step in run]
    return [*runs[:first], (False, shared), (True, layer), *runs[last + 1 :]]


def _renamed(step: Step, copy: int) -> Step:
    communicates = step.communicates
    if isinstance(communicates, Wait):
        communicates = Wait(f"{communicates.of}#{copy}")
    return replace(step, name=f"{step.name}#{copy}", communicates=communicates,
                   reads=tuple(f"{name}#{copy}" for name in step.reads))


def _groups(program: Program, stack: Stack) -> list[list[fx.Node]]:
    """The calls of each layer, in order."""
    groups: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        index = stack.index(location_of(node).layer) if node.op == "call_function" else None
        if index is not None:
            groups.setdefault(index, []).append(node)
    return [groups[index] for index in sorted(groups)]


def _signature(groups: Sequence[list[fx.Node]], index: int, *, inner: bool = False) -> str:
    """What a layer computes: equal for layers that do the same with what they read.

    Args:
        groups: the layers' nodes.
        index: which layer.
        inner: leave out what is read from the layer before, which the first does not have.
    """
    here = {node: f"%{i}" for i, node in enumerate(groups[index])}
    before = {} if inner or not index else {n: f"<{i}" for i, n in enumerate(groups[index - 1])}

    def text(value: Any) -> str:
        if not isinstance(value, fx.Node):
            return repr(value)
        if value in here or value in before:
            return here.get(value) or before[value]
        return _type_text(value) if inner or value.op == "placeholder" else value.name

    return "\n".join(
        f"{node.target} {map_values((list(node.args), dict(node.kwargs)), text)} "
        f"{_type_text(node)}"
        for node in groups[index]
    )


def _type_text(node: fx.Node) -> str:
    """Of its type; what a check of the captured code returns has none."""
    type_ = node.meta.get("type")
    return "" if type_ is None else format_type(type_)
