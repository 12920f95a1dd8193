"""Repeated layers: cut a program to a few of them, and repeat them again in a rank's cost.

A model with 80 equal layers is costed from one. Two layers are equal if the captured graph has the
same ops on the same shapes in both, reading the previous layer in the same places. Some models
repeat a pattern of several layers (five with a window, one without); such a group is called a
block. Layers before the first block are not part of the pattern.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

from torch import fx

from ringcompile.cost.rank import PIPELINE, RankCost, TimedShift, TimedStep, TimedWait
from ringcompile.ir.calls import append, map_values
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import format_type

_INDEX = re.compile(r"^(?P<stack>[^0-9.][^.]*(?:\.[^0-9.][^.]*)*)\.(?P<index>\d+)(?:\.|$)")


@dataclass(frozen=True)
class Stack:
    """The repeated layers of a model, one layer or several in a block.

    Attributes:
        name: their common module path, such as "model.layers".
        num_layers: how many there are.
        block_bytes: the bytes of the first block's weights.
        num_bytes: the bytes of all blocks' weights.
        period: the number of layers in a block; the last block may have fewer.
        first: the number of layers of that name before the first block.
    """

    name: str
    num_layers: int
    block_bytes: int = 0
    num_bytes: int = 0
    period: int = 1
    first: int = 0

    def index(self, layer: str) -> int | None:
        """The index of the block that a module path lies in."""
        found = _INDEX.match(layer)
        if found is None or found["stack"] != self.name or int(found["index"]) < self.first:
            return None
        return (int(found["index"]) - self.first) // self.period

    @property
    def whole_blocks(self) -> int:
        """The number of complete blocks."""
        return self.num_layers // self.period

    def stands_for(self, stages: int) -> bool:
        """Whether a program with one block per stage can represent the whole pipeline.

        It cannot if a stage holds less than a block, or if the model begins with other layers.
        """
        return stages == 1 or (stages <= self.whole_blocks and self.first == 0)

    def starts(self, stages: int) -> tuple[str, ...]:
        """With one block per stage, the first layer of each stage but the first."""
        if not self.stands_for(stages):
            return ()
        return tuple(f"{self.name}.{stage * self.period}" for stage in range(1, stages))

    def blocks(self, stages: int = 1) -> float:
        """How many blocks, possibly not a whole number, the largest pipeline stage holds."""
        return -(-self.num_layers // stages) / self.period


def find_stack(program: Program) -> Stack | None:
    """The repeated layers that make up most of a captured program; None if nothing repeats."""
    paths = (_INDEX.match(location_of(n).layer) for n in program.graph.nodes)
    counts = Counter(found["stack"] for found in paths if found)
    if not counts:
        return None
    name = counts.most_common(1)[0][0]
    layers = _groups(program, Stack(name, 0))
    pattern = _pattern(list(layers.values())) if list(layers) == list(range(len(layers))) else None
    if pattern is None:
        return None
    first, period = pattern
    stack = Stack(name, len(layers) - first, period=period, first=first)
    held = [(stack.index(w.name), w.num_bytes) for w in program.weights.values()]
    return replace(
        stack,
        block_bytes=sum(num_bytes for index, num_bytes in held if index == 0),
        num_bytes=sum(num_bytes for index, num_bytes in held if index is not None),
    )


def _pattern(layers: Sequence[list[fx.Node]]) -> tuple[int, int] | None:
    """The number of layers before the pattern (at most a third of all) and the length of a block.

    The smallest numbers that fit are returned.
    """
    count = len(layers)
    texts = [_signature(layers, i) for i in range(count)]
    inner = [_signature(layers, i, inner=True) for i in range(count)]

    def repeats(first: int, period: int) -> bool:
        """Whether blocks of `period` layers repeat from layer `first`, which may read others."""
        return (
            inner[first] == inner[first + period]
            and all(texts[i] == texts[i + period] for i in range(first + 1, count - period))
            and _follow([
                list(chain(*layers[i : i + period])) for i in range(first, count, period)
            ])
        )

    pairs = ((first, both - first) for both in range(1, count) for first in range(both))
    return next(
        ((first, period) for first, period in pairs
         if 3 * first <= count and first + 2 * period <= count and repeats(first, period)),
        None,
    )


def _follow(blocks: Sequence[list[fx.Node]]) -> bool:
    """Whether each block passes the same values to the next block, and to no other."""
    handed_on = {tuple(map(_type_text, _read_later(block))) for block in blocks}
    return len(handed_on) == 1 and all(
        user in block or user in following
        for block, following in zip(map(set, blocks), map(set, blocks[1:]), strict=False)
        for node in block
        for user in node.users
    )


def _read_later(block: list[fx.Node]) -> list[fx.Node]:
    """The values of a block that later blocks read."""
    here = set(block)
    return [node for node in block if any(user not in here for user in node.users)]


def cut(program: Program, stack: Stack, count: int) -> Program:
    """The program cut to one block for each of `count` stages, if that can represent them.

    The ops after the last layer read the last layer that is kept.
    """
    groups = list(_groups(program, stack).values())
    if count >= len(groups) or not stack.stands_for(count):
        return program
    dropped = {node for group in groups[count:] for node in group}
    stands_in = dict(zip(*map(_read_later, (groups[-1], groups[count - 1])), strict=True))
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
    """Repeat each block in a rank's cost as often as the whole model has it.

    Args:
        cost: the cost of a program with one block, or with one block per pipeline stage.
        stack: the repeated layers.
        times: how often the whole model has each block.
    """
    steps: list[TimedStep] = []
    cost = replace(cost, steps=tuple(chain(*(_at_the_end(step, stack) for step in cost.steps))))
    between = {step.name for step in cost.steps if _crosses(step)}
    between |= {step.name for step in cost.steps
                if isinstance(step.communicates, TimedWait) and step.communicates.of in between}
    runs = groupby(
        cost.steps,
        key=lambda step: stack.index(step.layer) is not None and step.name not in between,
    )
    repeated = _joined([(inside, list(run)) for inside, run in runs])
    for inside, run in repeated:
        steps += [_renamed(step, i) for i in range(times) for step in run] if inside else run
    nodes = cost.num_nodes * len(steps) // max(len(cost.steps), 1)
    more = [w for w in cost.weights if stack.index(w[0]) is not None] * (times - 1)
    caches = [c for c in cost.caches if stack.index(c[0]) is not None] * (times - 1)
    held = sum(num_bytes for _, num_bytes in (*more, *caches))
    return replace(cost, steps=tuple(steps), num_nodes=nodes, weights=(*cost.weights, *more),
                   caches=(*cost.caches, *caches), peak_bytes=cost.peak_bytes + held)


def _at_the_end(step: TimedStep, stack: Stack) -> list[TimedStep]:
    """A step, or two where a fused group reaches over an end of the repeated blocks.

    Such groups lie between all blocks, each the end of one block and the beginning of the next,
    while the first block begins with nodes by themselves. So the nodes of a block before its end
    count as what the group adds to those behind it. The sum is then that of all groups.
    """
    group = step.across
    if group is None or (stack.index(group.first) is None) == (stack.index(group.last) is None):
        return [step]
    (whole,) = step.kernels
    first, last = replace(whole, less=group.behind), group.behind
    if stack.index(group.first) is not None:
        first = replace(group.between, less=group.behind)
        last = replace(whole, less=first)  # what is read behind blocks alone need not be written
    return [
        replace(step, name=f"{step.name}#begin", layer=group.first, kernels=(first,), across=None),
        replace(step, layer=group.last, kernels=(last,), across=None),
    ]


def _crosses(step: TimedStep) -> bool:
    """Whether a step sends to or receives from another stage, which happens once per run."""
    return isinstance(step.communicates, TimedShift) and step.communicates.channel == PIPELINE


def _joined(runs: list[tuple[bool, list[TimedStep]]]) -> list[tuple[bool, list[TimedStep]]]:
    """The steps from the first to the last one inside a block, as one run."""
    inside = [i for i, (flag, _) in enumerate(runs) if flag]
    if not inside:
        return runs
    first, last = inside[0], inside[-1]
    layer = [step for flag, run in runs[first : last + 1] if flag for step in run]
    shared = [step for flag, run in runs[first : last + 1] if not flag for step in run]
    return [*runs[:first], (False, shared), (True, layer), *runs[last + 1 :]]


def _renamed(step: TimedStep, copy: int) -> TimedStep:
    communicates = step.communicates
    if isinstance(communicates, TimedWait):
        communicates = TimedWait(f"{communicates.of}#{copy}")
    reads = tuple(f"{name}#{copy}" for name in step.reads)
    return TimedStep(
        f"{step.name}#{copy}", step.op, step.layer, step.kernels, communicates, reads
    )


def _groups(program: Program, stack: Stack) -> dict[int, list[fx.Node]]:
    """The calls of each block by its index, in order."""
    groups: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        index = stack.index(location_of(node).layer) if node.op == "call_function" else None
        if index is not None:
            groups.setdefault(index, []).append(node)
    return {index: groups[index] for index in sorted(groups)}


def _signature(groups: Sequence[list[fx.Node]], index: int, *, inner: bool = False) -> str:
    """A signature of what a layer computes; equal layers have equal signatures.

    Args:
        groups: the layers' nodes.
        index: which layer.
        inner: leave out values read from the previous layer, since the first layer has none.
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
    """The type of a node as text; empty for checks in the captured code, which return nothing."""
    type_ = node.meta.get("type")
    return "" if type_ is None else format_type(type_)
