"""Inputs for a length and a seed, by the role of each: what a comparison is worth depends on them.

Ids come from the whole vocabulary, with the edges of every rank's share among them; masks have
padding on the right, holes, or padding on the left; seed 0 has masks of ones, as examples do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from ringcompile.ir.expr import BATCH, SEQUENCE, bind
from ringcompile.ir.program import Input, Program
from ringcompile.numerics.roles import INDEX, MASK, NUMBERS, PAIRS, POSITIONS, Role

PADDING = ("no padding", "padding on the right", "holes", "padding on the left")
# How large normal numbers are, in turn: larger ones make scores differ, so that masks matter.
GAINS = (1.0, 2.0)
# The share of ids that are numbers which the model compares ids with, and those at edges of shares.
_SPECIAL, _EDGES = 0.1, 0.3


@dataclass(frozen=True)
class Draw:
    """How inputs are drawn; the same fields give the same inputs.

    Attributes:
        length: of the sequence; further lengths are as long, shorter or longer, by the seed.
        seed: decides numbers, and the form of masks.
        plain: 0, or how often a model has refused such inputs: special ids are left out first,
            then indices come from half, a quarter, ... of the rows.
    """

    length: int
    seed: int
    plain: int = 0

    @property
    def padding(self) -> str:
        """The form of masks."""
        return PADDING[self.seed % len(PADDING)]


def draw_inputs(
    program: Program,
    roles: Mapping[str, Role],
    draw: Draw,
    replicas: int,
    shares: int,
    run_by: Program | None = None,
    batch: int | None = None,
) -> dict[str, torch.Tensor]:
    """Whole inputs by name.

    Args:
        program: says which inputs there are.
        roles: of its inputs.
        draw: length and seed.
        replicas: as many sequences as there are, one more, or a few for each, by the seed.
        shares: into how many parts ranks divide a vocabulary.
        run_by: the program that has to take the batch as well, if it is another one.
        batch: how many sequences, whatever the seed.
    """
    generator = torch.Generator().manual_seed(draw.seed)
    found = {}
    run_by = run_by or program
    low, high = run_by.batch_range
    wanted = (replicas + 1, replicas, 3 * replicas + 2)[draw.seed % 3]
    if batch is None:
        batch = max(low, replicas, min(wanted, high or wanted))
        batch += -batch % run_by.batch_multiple
    known = {**_lengths(run_by, draw), BATCH: batch}
    for spec in program.inputs:
        shape = [int(bind(size, known)) for size in spec.type.shape]
        role = _bound(roles[spec.name], known)
        values = _DRAWN.get(role.kind, _small)(spec, shape, role, draw, generator)
        if role.kind == INDEX:
            _put_edges(values, role, draw, shares, generator)
        if spec.values is not None:
            values = torch.tensor(spec.values).reshape(shape)
        found[spec.name] = values.to(spec.type.dtype)
    return found


def _lengths(program: Program, draw: Draw) -> dict[str, int]:
    """The lengths of the inputs: further ones are as long, about half as long, or longer."""
    length = draw.length
    wanted = (length // 2 + 1, length, length + length // 3 + 1)
    found = {SEQUENCE: length}
    for i, name in enumerate(program.length_names):
        if name != SEQUENCE:
            low, high = program.other_ranges.get(name, (1, None))
            size = max(wanted[(draw.seed + i) % 3], low)
            found[name] = size if high is None else min(size, high)
    return found


def token_mask(
    inputs: Mapping[str, torch.Tensor], roles: Mapping[str, Role]
) -> torch.Tensor | None:
    """Which tokens [B, S] are real, where the inputs say so."""
    masks = [x for name, x in inputs.items() if roles[name].kind == MASK and x.dim() == 2]
    return masks[0].bool() if masks else None


def _bound(role: Role, lengths: Mapping[str, int]) -> Role:
    """The same with its number of rows; a row of the smallest batch is one of any."""
    known = {**lengths, BATCH: 1}
    return role if role.rows is None else replace(role, rows=bind(role.rows, known))


def _rows(role: Role, draw: Draw) -> tuple[int, int]:
    """The first and the last value that an index may have."""
    rows = draw.length if role.rows is None else int(role.rows)
    rows = max(rows >> max(draw.plain - 1, 0), 1)
    return -role.shift, rows - role.shift - 1


def _index(
    spec: Input, shape: list[int], role: Role, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    low, high = _rows(role, draw)
    values = torch.randint(low, high + 1, shape, generator=generator)
    chosen = [v for v in role.values if low <= v <= high]
    if chosen and not draw.plain:
        special = torch.tensor(chosen)[torch.randint(len(chosen), shape, generator=generator)]
        values = torch.where(torch.rand(shape, generator=generator) < _SPECIAL, special, values)
    return values


def _put_edges(
    values: torch.Tensor, role: Role, draw: Draw, shares: int, generator: torch.Generator
) -> None:
    """Put the first and last row of every rank's share somewhere among the indices."""
    low, high = _rows(role, draw)
    width = -(-(high - low + 1) // shares)
    starts = [low + width * part for part in range(shares)]
    edges = [e for start in starts for e in (start, start + width - 1) if e <= high]
    edges = list(dict.fromkeys([*edges, high]))
    room = max(1, int(values.numel() * _EDGES))
    first = draw.seed * room  # where not all of them fit, others are put by other seeds
    chosen = [edges[(first + i) % len(edges)] for i in range(min(room, len(edges)))]
    places = torch.randperm(values.numel(), generator=generator)[: len(chosen)]
    values.view(-1)[places] = torch.tensor(chosen)


def _mask(
    spec: Input, shape: list[int], role: Role, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    """Ones for real tokens; each row keeps its first token, or its last one."""
    length = shape[-1]
    kept = torch.randint(max(length // 4, 1), length + 1, (*shape[:-1], 1), generator=generator)
    holes = torch.rand(shape, generator=generator) < 0.7
    holes[..., :1] = True
    right = torch.arange(length) < kept
    return {
        "no padding": torch.ones_like(right), "padding on the right": right, "holes": holes,
        "padding on the left": right.flip(-1),
    }[draw.padding]


def _pairs(
    spec: Input, shape: list[int], role: Role, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    """A mask or a bias of queries and keys; every query sees itself."""
    seen = torch.rand(shape, generator=generator) < 0.7
    seen |= torch.eye(shape[-1], dtype=torch.bool)
    if not spec.type.dtype.is_floating_point:
        return torch.ones_like(seen) if draw.seed % 2 else seen
    bias = torch.randn(shape, generator=generator) * 2
    lowest = torch.finfo(spec.type.dtype).min
    return bias if draw.seed % 2 == 0 else bias.double().masked_fill(~seen, lowest)


def _numbers(
    spec: Input, shape: list[int], role: Role, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    gain = GAINS[draw.seed % len(GAINS)]
    return torch.randn(shape, generator=generator, dtype=torch.float64) * gain


def _positions(
    spec: Input, shape: list[int], role: Role, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    """In order; with odd seeds each row begins elsewhere, if there are as many rows."""
    length = shape[-1]
    order = torch.arange(length).expand(shape)
    if role.rows is None:
        room = length
    else:
        low, high = _rows(role, draw)
        order, room = (order + low).clamp(max=high), max(high - low + 2 - length, 1)
    begin = torch.randint(0, room, (*shape[:-1], 1), generator=generator)
    return order + begin if draw.seed % 2 else order.clone()


def _small(
    spec: Input, shape: list[int], role: Role, draw: Draw, generator: torch.Generator
) -> torch.Tensor:
    """Numbers that rise along each row, as those of documents do."""
    return torch.randint(0, 3, shape, generator=generator).sort(-1).values


_DRAWN: dict[str, Callable[..., torch.Tensor]] = {
    INDEX: _index, MASK: _mask, PAIRS: _pairs, POSITIONS: _positions, NUMBERS: _numbers,
}
