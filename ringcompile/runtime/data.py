"""Entry and exit: whole inputs to each rank's share, each rank's outputs to whole ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import bind
from ringcompile.ir.layout import Atom
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Input, Program
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.sequence import positions
from ringcompile.runtime.pieces import Share
from ringcompile.runtime.tail import sequence_dim, windows

# Where a share lies in the whole: from which index to which of every dim.
Ranges = tuple[slice, ...]


def name_inputs(program: Program, inputs: Any) -> dict[str, torch.Tensor]:
    """Inputs by name, from a mapping, a sequence in order, or one tensor.

    Raises:
        RingCompileError: too many, too few, or unknown names; ids that a table has no row for.
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
            f"the program takes the inputs {names}, but got {list(inputs)}",
            hint="pass all of them, in this order or by name",
        )
    for spec in program.inputs:
        _check_ids(spec, inputs[spec.name])
    return {name: inputs[name] for name in names}


def _check_ids(spec: Input, tensor: torch.Tensor) -> None:
    """Raise RingCompileError for other values than a program is for, or ids without a row.

    It is done here, on whole inputs, so that every rank says the same before any of them starts;
    for tensors on a GPU it waits for their smallest and largest entry.
    """
    if spec.values is not None and tuple(tensor.flatten().tolist()) != spec.values:
        wanted = torch.tensor(spec.values).reshape([int(size) for size in spec.type.shape])
        raise RingCompileError(
            f"input '{spec.name}' is {tensor.tolist()}: the program is for {wanted.tolist()} alone",
            hint="capture the model with an example that has these values: its code decides by "
            "them which positions, windows and pieces there are",
        )
    if not spec.limits or tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (int(x) for x in torch.aminmax(tensor))
    for limit in spec.limits:
        wrong = low if low < limit.low else high
        if limit.low <= wrong <= limit.high:
            continue
        where = (tensor == wrong).nonzero()[0].tolist()
        raise RingCompileError(
            f"input '{spec.name}' holds {wrong} at {where}: the table that it indexes has rows for "
            f"{limit.low} to {limit.high}",
            hint="pass ids that the model knows",
            location=limit.location,
        )


def share_inputs(
    program: Program, inputs: Mapping[str, torch.Tensor], lengths: dict[str, int]
) -> dict[str, torch.Tensor]:
    """One rank's share of whole inputs, by placeholder name.

    Args:
        program: the program of that rank.
        inputs: whole inputs by name.
        lengths: from `program.bindings`.
    """
    whole = {placeholder: inputs[name] for placeholder, name in program.placeholders.items()}
    return shares_of(program, whole, lengths)


def shares_of(
    program: Program, inputs: Mapping[str, torch.Tensor], lengths: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """One rank's share of what its placeholders take, of the whole sequence.

    Args:
        program: the program of that rank.
        inputs: by placeholder name, of the whole batch or of one part of it.
        lengths: of that part.
    """
    types = {n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"}
    return {
        placeholder: share_of(program, tensor, types[placeholder], lengths)
        for placeholder, tensor in inputs.items()
    }


def share_of(
    program: Program, tensor: torch.Tensor, type_: TensorType, lengths: Mapping[str, int]
) -> torch.Tensor:
    """One rank's share of a whole tensor: an input, or a weight.

    Args:
        program: the program of that rank.
        tensor: the whole.
        type_: its type, with the layout that the program takes it in.
        lengths: of the run; a weight needs none.
    """
    for dim, atoms in enumerate(type_.layout.dims):
        if not atoms:
            continue
        sizes = [int(bind(atom.size, lengths)) for atom in atoms]
        tensor = tensor.unflatten(dim, sizes)
        for i, atom in enumerate(atoms):
            tensor = _piece(program, tensor, dim + i, atom, lengths)
        tensor = tensor.flatten(dim, dim + len(atoms) - 1)
    return tensor


def share_slices(program: Program, type_: TensorType) -> Ranges:
    """The share of a weight as a range of every dim; nothing where it is whole or in pieces."""
    if program.mesh is None or type_.layout.is_whole:
        return ()
    return share_ranges(program, type_) or ()


def share_ranges(program: Program, type_: TensorType) -> Ranges | None:
    """The share of a weight as a range of every dim; None where it is in pieces."""
    dims = type_.layout.dims
    if any(len(atoms) > 1 for atoms in dims):
        return None
    ranges = []
    for size, atoms in zip(type_.shape, dims, strict=True):
        width, start = int(size), 0
        if atoms:
            assert program.mesh is not None
            axis = ",".join(atoms[0].axes)
            width //= program.mesh.size(axis)
            start = program.mesh.index(program.coordinates or {}, axis) * width
        ranges.append(slice(start, start + width))
    return tuple(ranges)


def share_keys(program: Program) -> dict[str, Any]:
    """For each weight's placeholder what is equal where two ranks hold the same share of it."""
    types = {n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"}
    mesh, coordinates = program.mesh, program.coordinates or {}
    return {
        placeholder: (
            weight.name,
            types[placeholder].layout,
            tuple(
                mesh.index(coordinates, axis)
                for axis in types[placeholder].layout.axes
                if mesh is not None
            ),
        )
        for placeholder, weight in program.weights.items()
    }


def _piece(
    program: Program, tensor: torch.Tensor, dim: int, atom: Atom, lengths: Mapping[str, int]
) -> torch.Tensor:
    """What a rank holds of a dim that is one atom."""
    if not atom.axes:
        return tensor
    mesh, coordinates, sequence = program.mesh, program.coordinates, program.sequence
    assert mesh is not None
    assert coordinates is not None
    if not atom.sequence:
        axis = ",".join(atom.axes)
        width = tensor.shape[dim] // mesh.size(axis)
        return tensor.narrow(dim, mesh.index(coordinates, axis) * width, width)
    assert sequence is not None
    level = sequence.at(atom)
    chunks: Any = level.own_chunks(coordinates)
    chunk, limit = int(bind(level.chunk, lengths)), int(bind(level.length, lengths))
    return tensor.index_select(dim, positions(chunks, chunk, limit, tensor.device))


def assembled(
    program: Program,
    index: int,
    shares: Sequence[Share],
    lengths: dict[str, int],
    last: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One whole output, of one part of the batch.

    Args:
        program: of a rank of the last stage.
        index: which output.
        shares: its shares, one for each rank of a replica that returns outputs; ranks in order, as
            `by_replica` gives them. Pieces are taken, and freed one by one. Where several ranks
            hold the same share, the first of them is taken.
        lengths: from `program.bindings`.
        last: of the sequence, the last positions that the shares hold; None where they hold all.
        out: where to put it, a tensor of its shape; by default into memory of its own.
    """
    type_, mesh = type_of(program.outputs[index]), program.mesh
    if out is None and type_.layout.is_whole and isinstance(shares[0], torch.Tensor):
        return shares[0]
    assert mesh is not None
    dims = [dim or (Atom(size),) for size, dim in zip(type_.shape, type_.layout.dims, strict=True)]
    atoms = [atom for dim in dims for atom in dim]
    ranges = [_ranges(program, atom, lengths) for atom in atoms]
    sizes = [int(bind(atom.size, lengths)) for atom in atoms]
    shape = [int(bind(size, lengths)) for size in type_.shape]
    if last is not None and (dim := sequence_dim(program, type_)) is not None:
        window, at = windows(type_, dim, lengths, last), sum(map(len, dims[:dim]))
        ranges[at] = {place: _within(rows, window) for place, rows in ranges[at].items()}
        sizes[at] = shape[dim] = len(window)
    if out is None:
        out = torch.empty(shape, dtype=shares[0].dtype, device=shares[0].device)
    opened, needed = out.view(sizes), owners(mesh, type_)
    for coordinates, share in zip(_returning(mesh), shares, strict=True):
        if mesh.rank(coordinates) not in needed:
            continue
        held = [each[mesh.index(coordinates, ",".join(atom.axes)) if atom.axes else 0]
                for atom, each in zip(atoms, ranges, strict=True)]
        along = None if isinstance(share, torch.Tensor) else share.dim
        if isinstance(share, torch.Tensor) or along is None or len(dims[along]) > 1:
            _put_opened(opened, _in_one(share), held)
            continue
        at = sum(map(len, dims[:along]))
        for start, part in share.taken():
            place = _part(held[at], start, part.shape[along])
            _put_opened(opened, part, [*held[:at], place, *held[at + 1 :]])
    return out


def owners(mesh: Mesh, type_: TensorType) -> list[int]:
    """The ranks whose shares together make up an output of all replicas, none of it twice."""
    seen: dict[Any, int] = {}
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        if at.get("pp", 0) == mesh.size("pp") - 1:
            shares = tuple(mesh.index(at, axis) for axis in type_.layout.axes)
            seen.setdefault((at.get("dp", 0), shares), rank)
    return list(seen.values())


def _in_one(share: Share) -> torch.Tensor:
    if isinstance(share, torch.Tensor):
        return share
    parts = [part for _, part in share.taken()]  # several only of `Pieces`, which keep theirs
    return parts[0] if len(parts) == 1 or share.dim is None else torch.cat(parts, share.dim)


def _part(rows: list[range], start: int, count: int) -> list[range]:
    """Where `count` rows of a share lie, from its row `start` on."""
    found, passed = [], 0
    for run in rows:
        part = run[max(0, start - passed) : max(0, start + count - passed)]
        found += [part] if part else []
        passed += len(run)
    return found


def _put_opened(whole: torch.Tensor, share: torch.Tensor, held: list[list[range]]) -> None:
    """Copy a share to its place, with a dim for each atom."""
    _put(whole, share.reshape([sum(map(len, rows)) for rows in held]), held)


def _within(rows: list[range], window: range) -> list[range]:
    """The parts of runs that lie in a window, counted from its start."""
    parts = [range(max(r.start, window.start), min(r.stop, window.stop)) for r in rows]
    return [range(r.start - window.start, r.stop - window.start) for r in parts if len(r)]


def _returning(mesh: Mesh) -> list[dict[str, int]]:
    """The coordinates of the ranks of the first replica that return outputs: its last stage."""
    everyone = map(mesh.coordinates, range(mesh.world_size))
    last = mesh.size("pp") - 1
    return [at for at in everyone if at.get("dp", 0) == 0 and at.get("pp", last) == last]


def by_replica(mesh: Mesh, values: Sequence[Any]) -> list[list[Any]]:
    """What the ranks that return outputs have of every rank's values, by replica.

    Args:
        mesh: the mesh.
        values: one a rank, in order.
    """
    return [
        [values[mesh.rank({**at, **({"dp": replica} if "dp" in at else {})})]
         for at in _returning(mesh)]
        for replica in range(mesh.size("dp"))
    ]


def _ranges(program: Program, atom: Atom, lengths: Mapping[str, int]) -> dict[int, list[range]]:
    """Where in an atom the shares lie, by place on its axes; a share may be several runs."""
    size = int(bind(atom.size, lengths))
    if not atom.axes:
        return {0: [range(size)]}
    assert program.mesh is not None
    assert program.sequence is not None
    if not atom.sequence:
        places = program.mesh.size(",".join(atom.axes))
        width = size // places
        return {place: [range(place * width, (place + 1) * width)] for place in range(places)}
    level = program.sequence.at(atom)
    chunk, places = int(bind(level.chunk, lengths)), level.num_ranks
    return {
        place: [range(int(c) * chunk, (int(c) + 1) * chunk) for c in level.chunks(place)]
        for place in range(places)
    }


def _put(whole: torch.Tensor, share: torch.Tensor, held: list[list[range]]) -> None:
    """Copy a share to its place, run by run; what would lie behind the end is padding."""
    starts = [accumulate(map(len, rows), initial=0) for rows in held]
    dims = [list(zip(start, rows, strict=False)) for start, rows in zip(starts, held, strict=True)]
    for runs in product(*dims):
        ends = [min(run.stop, size) for (_, run), size in zip(runs, whole.shape, strict=True)]
        counts = [end - run.start for end, (_, run) in zip(ends, runs, strict=True)]
        if min(counts, default=1) > 0:
            place = tuple(slice(run.start, end) for end, (_, run) in zip(ends, runs, strict=True))
            taken = tuple(slice(at, at + n) for n, (at, _) in zip(counts, runs, strict=True))
            whole[place] = share[taken]
