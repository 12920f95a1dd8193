"""Faults of what ranks hold and take: shares of weights, inputs, outputs, whole programs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ringcompile.ir.layout import Atom, Layout, normalise
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from tests.ir.faults.cases import (
    Kind,
    Mutation,
    Programs,
    at_a_site,
    longer,
    only_with_two_axes,
)


def at_a_weight(
    mutate: Callable[[Program, fx.Node, random.Random], None],
    fits: Callable[[TensorType], bool] = lambda type_: True,
) -> Mutation:
    """A mutation of one rank's share of one weight."""
    return at_a_site(
        lambda programs: [
            (p, n) for p in programs for n in p.graph.nodes
            if n.op == "placeholder" and n.name in p.weights and fits(type_of(n))
        ],
        mutate,
    )


def split(type_: TensorType) -> bool:
    return bool(type_.layout.axes)


def matrix_in_part(type_: TensorType) -> bool:
    return split(type_) and len(type_.shape) == 2 and type_.shape[0] == type_.shape[1]


def whole_matrix(type_: TensorType) -> bool:
    return not split(type_) and len(type_.shape) == 2


def relaid(change: Callable[[Program, TensorType], Layout]) -> Callable[..., None]:
    def mutate(program: Program, node: fx.Node, rng: random.Random) -> None:
        type_ = type_of(node)
        node.meta["type"] = type_.with_layout(change(program, type_))

    return mutate


def whole(program: Program, type_: TensorType) -> Layout:
    return Layout.whole(len(type_.shape))


def other_dim(program: Program, type_: TensorType) -> Layout:
    return Layout(tuple(reversed(type_.layout.dims)))


def in_part(program: Program, type_: TensorType) -> Layout:
    return Layout.split(2, 0, type_.shape[0], ("tp",))


def finer(program: Program, type_: TensorType) -> Layout:
    """Cut once more, along an axis or the rest of a part."""
    axes = type_.layout.axes
    assert program.mesh is not None
    others = [axis for axis in program.mesh.names if axis not in axes]
    added = (*axes, *others[:1])
    dims = tuple(
        normalise(Atom(a.size, added if a.axes else ()) for a in dim) for dim in type_.layout.dims
    )
    return Layout(dims)


def two_axes(type_: TensorType) -> bool:
    return split(type_) and all(
        size % 4 == 0 for size, dim in zip(type_.shape, type_.layout.dims, strict=True) if dim
    )


def interleaved(program: Program, type_: TensorType) -> Layout:
    """The right number of elements, in two runs instead of one, or in one instead of three."""
    dims = []
    for size, dim in zip(type_.shape, type_.layout.dims, strict=True):
        axes = next((atom.axes for atom in dim if atom.axes), ())
        if not dim:
            dims.append(dim)
        elif len(dim) > 1:
            dims.append((Atom(size, axes),))
        else:
            assert isinstance(size, int)
            dims.append((Atom(2), Atom(size // 2, axes)))
    return Layout(tuple(dims))


def all_of_a_group_otherwise(programs: Programs, rng: random.Random) -> bool:
    """Every group holds the whole, but one cuts it along the other dim."""
    mesh = programs[0].mesh
    assert mesh is not None
    if mesh.names != ["ring", "tp"]:
        return False
    names = [n.name for n in programs[0].graph.nodes if n.op == "placeholder"
             and n.name in programs[0].weights and matrix_in_part(type_of(n))]
    name, place = rng.choice(names), rng.randrange(2)
    for program in programs:
        assert program.coordinates is not None
        if program.coordinates["ring"] == place:
            node = next(n for n in program.graph.nodes if n.name == name)
            node.meta["type"] = type_of(node).with_layout(other_dim(program, type_of(node)))
    return True


def changed(**fields: Any) -> Callable[..., None]:
    """The weight table's entry of one rank."""

    def mutate(program: Program, node: fx.Node, rng: random.Random) -> None:
        weight = dataclasses.replace(program.weights[node.name], **fields)
        program.weights = {**program.weights, node.name: weight}

    return mutate


def another_weight(program: Program, node: fx.Node, rng: random.Random) -> None:
    names = {weight.name for weight in program.weights.values()} - {program.weights[node.name].name}
    changed(name=rng.choice(sorted(names)))(program, node, rng)


def not_held(program: Program, node: fx.Node, rng: random.Random) -> None:
    program.weights = {p: w for p, w in program.weights.items() if p != node.name}


def no_such_shape(program: Program, node: fx.Node, rng: random.Random) -> None:
    node.meta["type"] = longer(type_of(node))


def an_input_otherwise(programs: Programs, rng: random.Random) -> bool:
    sites = [
        n for p in programs for n in p.graph.nodes
        if n.op == "placeholder" and n.name in p.placeholders and split(type_of(n))
    ]
    if sites:
        node = rng.choice(sites)
        node.meta["type"] = type_of(node).with_layout(Layout.whole(len(type_of(node).shape)))
    return bool(sites)


def an_output_otherwise(programs: Programs, rng: random.Random) -> bool:
    node = rng.choice([n for p in programs for n in p.outputs])
    node.meta["type"] = longer(type_of(node))
    return len([p for p in programs if p.outputs]) > 1


def another_order(programs: Programs, rng: random.Random) -> bool:
    index = rng.randrange(len(programs))
    sequence = programs[index].sequence
    assert sequence is not None
    order = "zigzag" if sequence.order == "contiguous" else "contiguous"
    programs[index] = programs[index].with_graph(
        programs[index].graph, sequence=dataclasses.replace(sequence, order=order)
    )
    return True


def a_fixed_length(programs: Programs, rng: random.Random) -> bool:
    index = rng.randrange(len(programs))
    programs[index] = programs[index].with_graph(programs[index].graph, lengths={"s": 8, "n": 4})
    return True


def a_rank_is_missing(programs: Programs, rng: random.Random) -> bool:
    programs.pop(rng.randrange(len(programs)))
    return True


def ranks_are_swapped(programs: Programs, rng: random.Random) -> bool:
    a, b = rng.sample(range(len(programs)), 2)
    programs[a], programs[b] = programs[b], programs[a]
    return True


_WEIGHT = r"weight '[\w.]+' \w+\[.*\]"
_BOX = r"\[\d+\.\.\d+.*\]"
OVERLAP = rf"rank \d and rank \d both hold {_BOX} of {_WEIGHT}, which is split over \S+"
GAP = rf"none of the ranks \d.* holds {_BOX} of {_WEIGHT}"
LEFT_OUT = rf"{_WEIGHT} is split over \S+, and of the ranks \d.* only \d.* hold a share"
UNEQUAL = rf"rank \d holds {_BOX} of {_WEIGHT}, rank \d {_BOX}: they should hold the same"
TAKEN = rf"rank \d takes {_WEIGHT} for %\w+, rank \d {_WEIGHT}"
SHARED = rf"{_WEIGHT} cannot be shared out: rank \d (takes|divides)"
MODELS = ("gpt with shares",)
KINDS: dict[str, Kind] = {
    "a share that is the whole": Kind(at_a_weight(relaid(whole), split), OVERLAP, MODELS, False),
    "a share along another dim": Kind(
        at_a_weight(relaid(other_dim), matrix_in_part), rf"{OVERLAP}|{GAP}", MODELS, False
    ),
    "a share of what is whole": Kind(
        at_a_weight(relaid(in_part), whole_matrix), rf"{GAP}|{OVERLAP}", MODELS, False
    ),
    "a share that is too small": Kind(
        only_with_two_axes(at_a_weight(relaid(finer), two_axes)),
        rf"{GAP}|{OVERLAP}|{LEFT_OUT}|{SHARED}",
        ("gpt with shares", "llama in groups"), False,
    ),
    "a share in other runs": Kind(
        at_a_weight(relaid(interleaved), two_axes), rf"{GAP}|{OVERLAP}", MODELS, False
    ),
    "a group that shares otherwise": Kind(
        all_of_a_group_otherwise, UNEQUAL, MODELS, False
    ),
    "another weight": Kind(at_a_weight(another_weight), TAKEN, MODELS, False),
    "a weight of another dtype": Kind(
        at_a_weight(changed(dtype=torch.float64)), TAKEN, MODELS, False
    ),
    "a weight of another shape": Kind(at_a_weight(changed(shape=(3, 5))), TAKEN, MODELS, False),
    "a weight that one rank does not hold": Kind(
        at_a_weight(not_held, split), LEFT_OUT, MODELS, False
    ),
    "a share of another weight's shape": Kind(at_a_weight(no_such_shape), SHARED, MODELS, False),
    "an input taken otherwise": Kind(
        an_input_otherwise, r"rank \d takes the inputs .*, rank \d ", ("llama", "llama in groups"),
        False,
    ),
    "an output of another shape": Kind(
        an_output_otherwise, r"rank \d returns .*, rank \d ", ("llama", "llama in groups"), False
    ),
    "the sequence in another order": Kind(
        another_order, r"rank \d divides the sequence as .*, rank \d ", ("llama",), False
    ),
    "another length": Kind(a_fixed_length, r"rank \d fixes the lengths .*, rank \d ", ("llama",),
                           False),
    "a rank that is missing": Kind(
        a_rank_is_missing, r"\d programs for a mesh of \d ranks", ("llama", "gpt in stages")
    ),
    "ranks in the wrong places": Kind(
        ranks_are_swapped, r"the program in the place of rank \d is for",
        ("llama", "gpt in stages"),
    ),
}
