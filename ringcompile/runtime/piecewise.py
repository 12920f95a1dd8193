"""Compiles what a rank computes between communications, piece by piece, with torch.compile.

A piece is a run of neighbouring steps that torch's compiler can see into: torch's own ops, and ours
that are written in them. Communication, attention kernels and ops whose sizes only the data tells
stay as they are, in the order in which they were; so overlap stays as the passes arranged it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import fx

from ringcompile.ir.calls import map_values
from ringcompile.ops.compilable import is_compilable
from ringcompile.runtime.steps import Slot, Step


def in_pieces(
    steps: list[Step], num_slots: int, kept: Iterable[int], compiler: str
) -> tuple[list[Step], int]:
    """The same steps, with runs of compilable ones compiled.

    Args:
        steps: of a program, in order.
        num_slots: values that a run holds.
        kept: slots of the program's outputs.
        compiler: a backend of torch.compile.

    Returns:
        the steps and the number of slots they need.
    """
    made: list[Step] = []
    last_use = {slot: i for i, step in enumerate(steps) for slot in _reads(step)}
    last_use.update(dict.fromkeys(kept, len(steps)))
    position = 0
    for compilable, run in groupby(steps, lambda step: is_compilable(step.node)):
        piece = list(run)
        position += len(piece)
        if not compilable or len(piece) == 1:
            made += piece
            continue
        outs = [step.out for step in piece if last_use.get(step.out, -1) >= position]
        made += _compiled(piece, outs, num_slots, compiler)
        num_slots += 1
    return made, num_slots


def _reads(step: Step) -> list[int]:
    found: list[int] = []
    map_values(
        (step.args, step.kwargs), lambda v: found.append(v.index) if isinstance(v, Slot) else None
    )
    return found


def _compiled(piece: list[Step], outs: list[int], slot: int, compiler: str) -> list[Step]:
    """One step that computes the whole piece, and a step each to take its results apart."""
    made = {step.out for step in piece}
    inputs = list(dict.fromkeys(i for step in piece for i in _reads(step) if i not in made))
    graph = fx.Graph()
    inside = {i: graph.placeholder(f"slot_{i}") for i in inputs}
    for step in piece:
        args, kwargs = map_values(
            (step.args, step.kwargs), lambda v: inside[v.index] if isinstance(v, Slot) else v
        )
        inside[step.out] = graph.call_function(step.function, tuple(args), kwargs)
    graph.output(tuple(inside[i] for i in outs))
    function = torch.compile(
        fx.GraphModule(torch.nn.Module(), graph), backend=compiler, fullgraph=True, dynamic=False
    )
    frees = [i for step in piece for i in step.frees if i not in made]
    whole = Step(
        piece[-1].node, function, [Slot(i) for i in inputs], {}, list(enumerate(inputs)), False,
        slot, frees, None,
    )
    nodes = {step.out: step.node for step in piece}
    taken = (_taken(nodes[out], slot, index, out, outs[-1]) for index, out in enumerate(outs))
    return [whole, *taken]


def _taken(node: fx.Node, slot: int, index: int, out: int, last: int) -> Step:
    frees = [slot] if out == last else []
    return Step(
        node, operator.getitem, [Slot(slot), index], {}, [(0, slot)], False, out, frees, None
    )
