"""Runs fused groups as one compiled function each.

Groups of layers that are alike have the same body: the same ops on values of the same sizes. Such a
body is compiled once in a process, at its first call, and again for inputs that lie in memory in
another way. A body that cannot be compiled is run op by op, which computes the same.
"""

from __future__ import annotations

import operator
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.utils._triton import has_triton

from ringcompile.ir.calls import map_values
from ringcompile.ir.fused import member_of
from ringcompile.runtime.steps import Slot, Step

INDUCTOR = "inductor"
_Function = Callable[..., Any]
_MANY = (list, tuple)


class Bodies:
    """What groups compute, compiled with one backend of torch.compile.

    Attributes:
        compiler: the backend.
        refusal: why some bodies run op by op; None while none does.
    """

    def __init__(self, compiler: str) -> None:
        self.compiler = compiler
        self.refusal: str | None = None
        self._known: dict[Any, Body] = {}

    def of(self, piece: Sequence[Step], inputs: Mapping[int, int], outs: Sequence[int]) -> Body:
        """The body of some steps.

        Args:
            piece: neighbouring steps.
            inputs: the slots that they read and do not write, each with the number of its tensors,
                or 0 where it is one tensor and no list.
            outs: the slots whose values are read behind them.
        """
        numbers = {slot: i for i, slot in enumerate([*inputs, *(step.out for step in piece)])}
        key = (
            tuple(inputs.values()), tuple(numbers[out] for out in outs),
            tuple((step.function, _text(step, numbers)) for step in piece),
        )
        if key not in self._known:
            self._known[key] = Body(_graph(piece, inputs, outs), self)
        return self._known[key]

    def compiled(self, module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> _Function:
        """A function of a graph, for inputs that lie in memory like these."""
        if self.compiler != INDUCTOR:
            return torch.compile(module, backend=self.compiler, fullgraph=True, dynamic=False)
        self.refusal = self.refusal or why_not_compiled(inputs)
        if self.refusal is not None:
            return module
        try:
            made: _Function = torch._inductor.compile(module, list(inputs))
        except Exception as error:  # of many kinds: the compiler and what it calls are not ours
            text = (str(error).splitlines() or [type(error).__name__])[0]
            self.refusal = f"torch's compiler failed: {text[:200]}"
            return module
        return made


class Body:
    """What a group computes, compiled for each way in which its inputs lie in memory."""

    def __init__(self, graph: fx.Graph, bodies: Bodies) -> None:
        self.module, self.bodies = fx.GraphModule(torch.nn.Module(), graph), bodies
        self._made: dict[Any, _Function] = {}

    def __call__(self, *values: Any) -> Any:
        """The outputs, a tuple; of values that are several tensors each is an input."""
        inputs = [x for value in values for x in (value if isinstance(value, _MANY) else (value,))]
        key = tuple([(x.shape, x.stride(), x.dtype, x.device) for x in inputs])
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self.bodies.compiled(self.module, inputs)
        return made(*inputs)


@cache
def bodies_of(compiler: str) -> Bodies:
    """Those of this process."""
    return Bodies(compiler)


def why_not_compiled(inputs: Sequence[torch.Tensor]) -> str | None:
    """Why Inductor cannot compile for where these tensors are; None if it can."""
    if any(x.is_cuda for x in inputs):
        return None if has_triton() else "Triton is not there"
    if any(map(shutil.which, ("g++", "clang++", "c++"))):
        return None
    return "no C++ compiler is there"


def _text(step: Step, numbers: dict[int, int]) -> str:
    """The arguments of a step, with numbers for the values that it reads."""
    return repr(map_values(
        (list(step.args), dict(step.kwargs)),
        lambda v: Slot(numbers[v.index]) if isinstance(v, Slot) else v,
    ))


def _graph(piece: Sequence[Step], inputs: Mapping[int, int], outs: Sequence[int]) -> fx.Graph:
    graph = fx.Graph()
    inside: dict[int, Any] = {
        slot: [graph.placeholder(f"slot_{slot}_{i}") for i in range(count)] if count
        else graph.placeholder(f"slot_{slot}")
        for slot, count in inputs.items()
    }
    for step in piece:
        args, kwargs = map_values(
            (step.args, step.kwargs), lambda v: inside[v.index] if isinstance(v, Slot) else v
        )
        inside[step.out] = graph.call_function(step.function, tuple(args), kwargs)
    graph.output(tuple(inside[slot] for slot in outs))
    return graph


def _reads(step: Step) -> list[int]:
    """The slots that a step reads."""
    found: list[int] = []
    map_values(
        (step.args, step.kwargs), lambda v: found.append(v.index) if isinstance(v, Slot) else None
    )
    return found


def with_groups(
    steps: Sequence[Step], num_slots: int, kept: Iterable[int], compiler: str
) -> tuple[list[Step], int]:
    """The same steps, with each fused group as one.

    Args:
        steps: of a program, in order.
        num_slots: values that a run holds.
        kept: slots of the program's outputs.
        compiler: a backend of torch.compile.

    Returns:
        the steps and the number of slots they need.
    """
    last_use = {slot: i for i, step in enumerate(steps) for slot in _reads(step)}
    last_use.update(dict.fromkeys(kept, len(steps)))
    made: list[Step] = []
    counts = {step.out: _count(step.node) for step in steps}
    at, bodies = 0, bodies_of(compiler)
    while at < len(steps):
        member = member_of(steps[at].node)
        piece = steps[at : at + (1 if member is None else member.size)]
        at += len(piece)
        if len(piece) == 1:
            made += piece
            continue
        outs = [step.out for step in piece if last_use.get(step.out, -1) >= at]
        made += _joined(piece, outs, num_slots, bodies, counts)
        num_slots += 1
    return made, num_slots


def _count(node: fx.Node) -> int:
    """How many tensors the value of a node is, if it is a list of them."""
    type_ = node.meta.get("type")
    return len(type_) if isinstance(type_, tuple) else 0


def _joined(
    piece: Sequence[Step], outs: Sequence[int], slot: int, bodies: Bodies,
    counts: Mapping[int, int],
) -> list[Step]:
    """One step that computes a whole piece, and a step each to take its results apart."""
    made = {step.out for step in piece}
    read = dict.fromkeys(i for step in piece for i in _reads(step) if i not in made)
    inputs = {i: counts.get(i, 0) for i in read}
    frees = [i for step in piece for i in step.frees if i not in made]
    whole = Step(
        piece[-1].node, bodies.of(piece, inputs, outs), [Slot(i) for i in inputs], {},
        list(enumerate(inputs)), False, slot, frees, None,
    )
    nodes = {step.out: step.node for step in piece}
    taken = (_taken(nodes[out], slot, index, out, outs[-1]) for index, out in enumerate(outs))
    return [whole, *taken]


def _taken(node: fx.Node, slot: int, index: int, out: int, last: int) -> Step:
    frees = [slot] if out == last else []
    return Step(
        node, operator.getitem, [Slot(slot), index], {}, [(0, slot)], False, out, frees, None
    )
