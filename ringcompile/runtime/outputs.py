"""What a run keeps of what a model returns: all of it, the last positions, or a few numbers.

Logits of 131,072 tokens over a vocabulary of 152,000 are 40 GB in float16. A run that nobody asks
for them does not bring them together: each rank counts and adds up its own share, piece by piece.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import torch

from ringcompile.ir.expr import bind
from ringcompile.ir.layout import Atom
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.runtime.data import owners
from ringcompile.runtime.tail import last_positions, sequence_dim, windows

_PIECE = 1 << 20  # numbers that are added up at a time


@dataclass(frozen=True)
class Kept:
    """What a rank keeps of a run's outputs.

    Attributes:
        last: the last positions of the sequence alone, so many of them; None for all.
        outputs: whether the outputs themselves are kept.
        summary: whether they are counted and added up.
    """

    last: int | None = None
    outputs: bool = True
    summary: bool = False

    def program(self, program: Program, lengths: Mapping[str, int]) -> Program:
        """A rank's program that computes what is kept; raises as `last_positions` does."""
        return program if self.last is None else last_positions(program, lengths, self.last)

    def of(
        self, program: Program, shares: tuple[torch.Tensor, ...], lengths: Mapping[str, int]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[Summary, ...]]:
        """What is kept of a rank's share of every output: the share, a summary, both or neither."""
        found = summaries(program, shares, lengths, self.last) if self.summary else ()
        return shares if self.outputs else (), found


EVERYTHING = Kept()


@dataclass(frozen=True)
class Summary:
    """A few numbers about a tensor, or about a rank's share of it.

    Attributes:
        count: how many numbers there are.
        real: their sum.
        imaginary: the sum of their imaginary parts.
        largest: the largest magnitude; -inf where there are no numbers, nan where one of them is.
    """

    count: float = 0.0
    real: float = 0.0
    imaginary: float = 0.0
    largest: float = -math.inf

    def __add__(self, other: Summary) -> Summary:
        """Of both together."""
        both = (self.largest, other.largest)
        return Summary(
            self.count + other.count, self.real + other.real, self.imaginary + other.imaginary,
            math.nan if any(map(math.isnan, both)) else max(both),
        )

    @property
    def mean(self) -> complex | float:
        """The mean; nan of nothing."""
        if not self.count:
            return math.nan
        mean = complex(self.real, self.imaginary) / self.count
        return mean if self.imaginary else mean.real


def summaries(
    program: Program, shares: Sequence[torch.Tensor], lengths: Mapping[str, int], last: int | None
) -> tuple[Summary, ...]:
    """Of a rank's share of each output; padding is not counted.

    Args:
        program: that rank's.
        shares: its share of every output.
        lengths: of the run.
        last: the number of last positions that were kept; None for all.
    """
    return tuple(
        sum(
            (_summary(piece) for part in _real_parts(program, type_of(node), share, lengths, last)
             for piece in _pieces(part)),
            Summary(),
        )
        for node, share in zip(program.outputs, shares, strict=False)
    )


def combined(
    program: Program, everyones: Sequence[Sequence[Sequence[Summary]]]
) -> tuple[Summary, ...]:
    """Of whole outputs, from those of all ranks; what several ranks hold is counted once.

    Args:
        program: that of the last rank, which is one of the last stage.
        everyones: for each rank, of each of its microbatches, of each output.
    """
    assert program.mesh is not None
    found = []
    for i, node in enumerate(program.outputs):
        ranks = owners(program.mesh, type_of(node))
        found.append(sum((runs[i] for rank in ranks for runs in everyones[rank]), Summary()))
    return tuple(found)


def shape_of(
    program: Program, index: int, lengths: Mapping[str, int], last: int | None
) -> list[int]:
    """The shape of a whole output.

    Args:
        program: that of the last rank.
        index: which output.
        lengths: of the run, the batch included.
        last: the number of last positions that were kept; None for all.
    """
    type_ = type_of(program.outputs[index])
    whole = program.returns[index] if program.returns else type_
    shape = [int(bind(size, lengths)) for size in whole.shape]
    if last is not None and (dim := sequence_dim(program, type_)) is not None:
        shape[dim] = len(windows(type_, dim, lengths, last))
    return shape


def positions_of(
    program: Program, type_: TensorType, lengths: Mapping[str, int], last: int | None
) -> torch.Tensor | None:
    """Where in the sequence the rows of a rank's share stand; None without a dim of the sequence.

    Args:
        program: that rank's.
        type_: the output's.
        lengths: of the run.
        last: the number of last positions that were kept; None for all.
    """
    spots = [i for i, dim in enumerate(type_.layout.dims) if any(atom.sequence for atom in dim)]
    if last is None and len(spots) != 1:
        return None
    dim = spots[0] if spots else sequence_dim(program, type_)
    if dim is None:
        return None
    assert program.sequence is not None
    atoms = type_.layout.dims[dim] or (Atom(type_.shape[dim]),)
    total = int(bind(program.sequence.of(atoms[-1].size).length, lengths))
    window = range(total) if last is None else windows(type_, dim, lengths, last)
    if not type_.layout.dims[dim]:
        return torch.arange(window.start, window.stop)
    level = program.sequence.at(atoms[-1])
    chunk = int(bind(level.chunk, lengths))
    held = [int(bind(index, {})) * chunk for index in level.own_chunks(program.coordinates)]
    rows = torch.cat([torch.arange(start, start + chunk) for start in held])
    return rows if last is None else rows[(rows >= window.start) & (rows < window.stop)]


def _real_parts(
    program: Program, type_: TensorType, share: torch.Tensor, lengths: Mapping[str, int],
    last: int | None,
) -> Iterator[torch.Tensor]:
    """A share without its padding, as views."""
    if last is not None or not any(atom.sequence for dim in type_.layout.dims for atom in dim):
        yield share
        return
    runs = [
        _real_rows(program, atom, lengths)
        for size, dim in zip(type_.shape, type_.layout.dims, strict=True)
        for atom in (dim or (Atom(size),))
    ]
    opened = share.reshape([width for width, _ in runs])
    for rows in itertools.product(*(held for _, held in runs)):
        yield opened[tuple(slice(row.start, row.stop) for row in rows)]


def _real_rows(
    program: Program, atom: Atom, lengths: Mapping[str, int]
) -> tuple[int, list[range]]:
    """How wide a rank's share of an atom is, and what of it is no padding."""
    size, mesh, sequence = int(bind(atom.size, lengths)), program.mesh, program.sequence
    if not atom.axes:
        return size, [range(size)]
    assert mesh is not None
    assert sequence is not None
    if not atom.sequence:
        width = size // mesh.size(",".join(atom.axes))
        return width, [range(width)]
    level = sequence.at(atom)
    chunk, held = int(bind(level.chunk, lengths)), level.own_chunks(program.coordinates)
    left = [size - int(bind(index, {})) * chunk for index in held]
    rows = [
        range(place * chunk, place * chunk + min(max(real, 0), chunk))
        for place, real in enumerate(left)
    ]
    return chunk * len(held), rows


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a tensor that are small, so that adding them up takes little memory."""
    if tensor.numel() <= _PIECE:
        yield tensor
        return
    dim = next(i for i, size in enumerate(tensor.shape) if size > 1)
    rows = max(1, tensor.shape[dim] * _PIECE // tensor.numel())
    for part in tensor.split(rows, dim):
        yield from _pieces(part)


def _summary(tensor: torch.Tensor) -> Summary:
    if not tensor.numel():
        return Summary()
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    total = complex(wide.sum().item())
    return Summary(wide.numel(), total.real, total.imag, float(wide.abs().max()))


def to_numbers(runs: Sequence[Sequence[Summary]], num_outputs: int) -> list[float]:
    """Summaries of a rank's outputs, its microbatches together, as plain numbers to send.

    Args:
        runs: of each microbatch, of each output; a stage that is not the last has none.
        num_outputs: of the model.
    """
    columns = list(zip(*runs, strict=True)) or [()] * num_outputs
    return [value for column in columns for value in astuple(sum(column, Summary()))]


def from_numbers(numbers: Sequence[float]) -> tuple[Summary, ...]:
    """What `to_numbers` wrote."""
    return tuple(Summary(*numbers[i : i + 4]) for i in range(0, len(numbers), 4))
