"""Entry and exit: whole inputs to each rank's share, each rank's outputs to whole ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import bind
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.sequence import join, positions


def name_inputs(program: Program, inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs by name, from a mapping, a sequence in order, or one tensor.

    Raises:
        RingCompileError: too many, too few, or unknown names.
    """
    names = [spec.name for spec in program.inputs]
    if torch.is_tensor(inputs):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(names, inputs, strict=False)) if len(inputs) <= len(names) else {
            str(i): tensor for i, tensor in enumerate(inputs)
        }
    if set(inputs) != set(names):
        raise RingCompileError(
            f"the program takes the inputs {names}, got {list(inputs)}",
            hint="pass all of them, in this order or by name",
        )
    return {name: inputs[name] for name in names}


def share_inputs(
    program: Program, inputs: Mapping[str, torch.Tensor], lengths: dict[str, int]
) -> dict[str, torch.Tensor]:
    """One rank's share of whole inputs, by placeholder name.

    Args:
        program: the program of that rank.
        inputs: whole inputs by name.
        lengths: from `program.bindings`.
    """
    types = {n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"}
    return {
        placeholder: _share(program, inputs[name], types[placeholder], lengths)
        for placeholder, name in program.placeholders.items()
    }


def _share(
    program: Program, tensor: torch.Tensor, type_: TensorType, lengths: dict[str, int]
) -> torch.Tensor:
    sequence = program.sequence
    for dim, atoms in enumerate(type_.layout.dims):
        if not atoms:
            continue
        assert sequence is not None
        assert program.coordinates is not None
        chunks: Any = sequence.own_chunks(program.coordinates)
        chunk = bind(sequence.chunk, lengths)
        assert isinstance(chunk, int)
        limit = bind(sequence.length, lengths)
        assert isinstance(limit, int)
        tensor = tensor.index_select(dim, positions(chunks, chunk, limit, tensor.device))
    return tensor


def assemble_outputs(
    program: Program, shares: Sequence[Sequence[torch.Tensor]], lengths: dict[str, int]
) -> Any:
    """Whole outputs, nested as the model returned them.

    Args:
        program: any rank's program.
        shares: for each rank, its share of every output.
        lengths: from `program.bindings`.
    """
    whole = [
        _assemble(program, type_of(node), [share[i] for share in shares], lengths)
        for i, node in enumerate(program.outputs)
    ]
    return program.output_structure.build(whole)


def _assemble(
    program: Program, type_: TensorType, shares: list[torch.Tensor], lengths: dict[str, int]
) -> torch.Tensor:
    sequence = program.sequence
    for dim, atoms in enumerate(type_.layout.dims):
        if not atoms:
            continue
        assert sequence is not None
        where = next(i for i, atom in enumerate(atoms) if atom.axes)
        before = [int(bind(atom.size, lengths)) for atom in atoms[:where]]
        after = [int(bind(atom.size, lengths)) for atom in atoms[where + 1 :]]
        opened = [
            share.reshape(*share.shape[:dim], *before, -1, *after, *share.shape[dim + 1 :])
            for share in shares
        ]
        limit = int(bind(sequence.length, lengths))
        chunks: Any = [sequence.chunks(rank) for rank in range(sequence.num_ranks)]
        joined = join(opened, chunks, dim + where, limit)
        return joined.flatten(dim, dim + len(atoms) - 1)
    return shares[0]
