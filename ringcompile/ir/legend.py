"""What a reader has to know to follow a dump: who the program is for, its symbols, what it sends.

Plain lines without comment marks, for the text form and the Python view alike.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import sympy
from torch import fx

from ringcompile.axes import HALVES, TIME
from ringcompile.ir import expr
from ringcompile.ir.call_text import (
    band_text,
    given_arguments,
    has_band,
    is_ours,
    op_name,
    parameters,
    symbols_of,
)
from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import GATHER, SHIFT, num_bytes
from ringcompile.ir.fused import RING_ATTENTION
from ringcompile.ir.group_text import legend_entries
from ringcompile.ir.layout import format_dim
from ringcompile.ir.nodes import kinds_of_nodes
from ringcompile.ir.types import SequenceSplit, TensorType, ValueType, bind_type, state_type

if TYPE_CHECKING:
    from ringcompile.ir.program import Program

WIDTH = 97
# Kept together when lines are filled.
_NO_BREAK = "\N{NO-BREAK SPACE}"


def title(program: Program, passes: str) -> list[str]:
    """Model, mesh, rank, and behind the word `passes` the passes that ran."""
    parts = [f"model {program.name}"]
    if program.mesh is not None:
        parts.append(f"mesh {program.mesh}")
    if program.sequence is not None:
        parts.append(f"order {program.sequence.order}")
    parts.append(rank_text(program))
    return ["   ".join(parts), *_filled(f"{passes}  ", ", ".join(program.passes))]


def rank_text(program: Program) -> str:
    """`one device`, `every rank` or `rank 1 of 4 (ring=1)`."""
    if program.mesh is None:
        return "one device"
    if program.coordinates is None:
        return "every rank"
    number = program.mesh.rank(program.coordinates)
    where = ", ".join(f"{axis}={at}" for axis, at in program.coordinates.items())
    return f"rank {number} of {program.mesh.world_size} ({where})"


def legend(program: Program, without: Collection[str] = ()) -> list[str]:
    """The symbols and words of a program's text, a line or a few each, but those in `without`."""
    uses = _Uses(program)
    entries = [entry for make in _ENTRIES for entry in make(uses) if entry[0] not in without]
    width = max((len(term) for term, _ in entries), default=0) + 2
    return [line for term, text in entries for line in _filled(f"{term:<{width}}", text)]


def is_state(value: ValueType | None) -> bool:
    """Whether a type is that of a state (out, lse) of attention."""
    if not isinstance(value, tuple) or len(value) != 2 or len(value[0].shape) != 4:
        return False
    return value[1] == state_type(value[0])[1]


# -- entries: (term, text), each where the program uses the term ---------------------------------

_Entries = Iterator[tuple[str, str]]


class _Uses:
    """What a program's text uses, found once for all entries."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = kinds_of_nodes(program.graph)
        self.calls = [node for node in self.nodes if node.op == "call_function"]
        self.ours = [node for node in self.calls if is_ours(node)]

    @cached_property
    def types(self) -> list[TensorType]:
        """All types, in the order of their first use."""
        found: dict[TensorType, None] = {}
        given = dict.fromkeys(node.meta["type"] for node in self.nodes if "type" in node.meta)
        for type_ in given:
            value = bind_type(type_, self.program.lengths)
            found.update(dict.fromkeys(value if isinstance(value, tuple) else (value,)))
        return list(found)

    @property
    def split_atoms(self) -> Iterator[Any]:
        """The atoms of all types that lie over a mesh axis."""
        dims = (dim for type_ in self.types for dim in type_.layout.dims)
        return (atom for dim in dims for atom in dim if atom.axes)

    @cached_property
    def symbols(self) -> set[str]:
        """The names of all symbols in types and arguments."""
        found = {name for node in self.nodes for name in symbols_of(node)}
        for type_ in self.types:
            atoms = [atom.size for dim in type_.layout.dims for atom in dim]
            sizes = (size for size in (*type_.shape, *atoms) if expr.is_symbolic(size))
            found.update(name for size in sizes for name in expr.symbols_in(size))
        return found

    @cached_property
    def kinds_of_calls(self) -> list[fx.Node]:
        """Calls of our ops, one for each way to give an op its band and to leave arguments out."""
        return list({_kind(node): node for node in self.ours}.values())

    def takes(self, names: set[str]) -> bool:
        """Whether one of our ops has an argument of these names."""
        return any(names & parameters(node) for node in self.ours)


def _kind(node: fx.Node) -> Hashable:
    """The op of a call, which arguments it has, and what hides keys from queries."""
    there = (*map(_is_there, node.args), *((k, _is_there(v)) for k, v in node.kwargs.items()))
    return node.target, there, node.kwargs.get("lower"), node.kwargs.get("upper")


def _is_there(value: Any) -> bool:
    return value is not None


def _lengths(uses: _Uses) -> _Entries:
    program = uses.program
    used = uses.symbols
    ranges = {expr.SEQUENCE: program.length_range, **program.other_ranges}
    for name, (low, high) in ranges.items():
        if name in {*used, *program.lengths}:
            allowed = f"{low} to {high}" if high is not None else f"at least {low}"
            what = "the sequence" if name == expr.SEQUENCE else "another sequence"
            fixed = name in program.lengths
            yield _term(program, name), (
                f"length of {what} in tokens, {'fixed' if fixed else allowed}"
            )
    sequence = program.sequence
    for split in (sequence, *sequence.others) if sequence is not None else ():
        if split.share in used or (split is sequence and any(uses.split_atoms)):
            yield _term(program, split.share), (
                f"tokens {_share(split)}: {expr.to_text(split.length)}, padded to a multiple of "
                f"{split.num_chunks}, over {_shares(split)}"
            )


def _share(sequence: SequenceSplit) -> str:
    if sequence.num_pieces == 1:
        return "that a rank holds"
    return "that a rank holds of a piece" if sequence.across else "of a piece"


def _shares(sequence: SequenceSplit) -> str:
    """`4 ranks`, `4 ranks and 2 pieces, which are computed one after another`."""
    pieces = f"{sequence.num_pieces} pieces, which are computed one after another"
    ranks = f"{prod(size for _, size in sequence.across)} ranks"
    both = [ranks] * bool(sequence.across) + [pieces] * (sequence.num_pieces > 1)
    return " and ".join(both or [ranks])


def _batches(uses: _Uses) -> _Entries:
    program = uses.program
    used = uses.symbols
    low, high = program.batch_range
    allowed = f"{low} to {high}" if high is not None else f"at least {low}"
    if expr.BATCH in used:
        yield _term(program, expr.BATCH), f"sequences of the whole batch, {allowed}"
    if expr.PART in used:
        yield expr.PART, "sequences of one part of the batch: a replica's, or a microbatch's"
    if expr.FIRST in used:
        yield expr.FIRST, "number in the batch of the first sequence of this part"


def _own_sizes(uses: _Uses) -> _Entries:
    program = uses.program
    used = uses.symbols
    if expr.OWN in used:
        yield _term(program, expr.OWN), "tokens that this rank holds, padding not counted"
    if any(expr.depends_on_data(expr.unbacked(name)) for name in used):
        yield "u0, u1, ..", "sizes that only the data tells"


def _term(program: Program, name: str) -> str:
    return f"{name} = {program.lengths[name]}" if name in program.lengths else name


def _split_dims(uses: _Uses) -> _Entries:
    """`s/ring` and what else is split."""
    program = uses.program
    sequence, seen = program.sequence, {}
    for atom in uses.split_atoms:
        text = f"a dim of {atom.size}, split over mesh axis {' and '.join(atom.axes)}"
        split = None if sequence is None or not atom.sequence else next(
            (of for of in (sequence, *sequence.others)
             if expr.equal(atom.size, expr.bind(of.length, program.lengths))), None
        )
        if split is not None:
            share = split.level(atom.axes).local
            text += f": a rank holds {expr.bind(share, program.lengths)} of it"
        seen[format_dim(None, (atom,))] = text
    yield from seen.items()


_WITHOUT_RANKS = {TIME: "which piece of the sequence", HALVES: "which half of the batch"}


def _axes(uses: _Uses) -> _Entries:
    program = uses.program
    mesh, used = program.mesh, uses.symbols
    for axis in mesh.names if mesh is not None else ():
        if axis in used:
            last = mesh.size(axis) - 1  # type: ignore[union-attr]
            what = _WITHOUT_RANKS.get(axis, f"this rank's coordinate on mesh axis {axis}")
            yield axis, f"{what}, 0 to {last}"
        if any(op_name(node).startswith(f"{axis}.") for node in uses.calls):
            yield f"{axis}.op", f"an op that communicates along mesh axis {axis}"


def _chunks(uses: _Uses) -> _Entries:
    program = uses.program
    sequence = program.sequence
    if sequence is None or not uses.takes({"chunks", "queries"}):
        return
    sizes = (expr.bind(s.chunk, program.lengths) for s in (sequence, *sequence.others))
    chunk = " or ".join(map(str, sizes))
    what = "each padded sequence is" if sequence.others else "the padded sequence is"
    yield "chunks", (
        f"{what} cut into chunks 0 to {sequence.num_chunks - 1} of {chunk} tokens; "
        f"this rank {_held(program, sequence)}; no query sees a key of the padding"
    )


def _held(program: Program, sequence: SequenceSplit) -> str:
    if not sequence.across and sequence.num_pieces > 1:
        return "has one after another"
    own = sequence.own_chunks(program.coordinates)
    return "holds " + " and ".join(str(chunk).replace(" ", _NO_BREAK) for chunk in own)


def _attention(uses: _Uses) -> _Entries:
    ours = uses.kinds_of_calls
    words = {word for node in ours if has_band(node) for word in band_text(node).split()}
    yield from ((word, text) for word, text in _BANDS.items() if word in words)
    given = {a.name for node in ours for a in given_arguments(node)}
    yield from ((name, text) for name, text in _SCORES.items() if name in given)
    if any(is_state(node.meta.get("type")) for node in uses.calls):
        yield "state", (
            "attention over some of the keys: out, of the shape shown, and for each of its rows "
            "lse, the logarithm of the sum of the exponentials of its scores"
        )


_BANDS = {
    "full": "every query sees every key",
    "causal": "a query sees the keys at its own and at earlier positions",
    "window": "of these the last so many, its own included",
    "band": "a query sees the keys that lie so many positions before it",
}
_SCORES = {
    "softcap": "the bound c of scores, which become c * tanh(score / c) before keys are hidden",
    "sink": "one more score for every query head: it takes weight from the keys and gives nothing",
}
_EXPERTS = {
    "expert_linear": "each row times the matrix of its own expert",
    "sort_rows": "rows by expert: their numbers in that order, the place of each, experts' ends",
    "grouped_linear": "rows that are sorted by expert, each times the matrix of its own",
}


def _experts(uses: _Uses) -> _Entries:
    used = {op_name(node) for node in uses.calls}
    yield from ((name, text) for name, text in _EXPERTS.items() if name in used)


def _transfers(uses: _Uses) -> _Entries:
    if uses.takes({"to", "source"}):
        yield "to, source", "whom a rank sends to, whom it receives from; None: nobody"


def _weights(uses: _Uses) -> _Entries:
    program = uses.program
    if program.weights:
        total = sum(weight.num_bytes for weight in program.weights.values())
        yield "@name", f"one of {len(program.weights)} weights, {total:,} bytes together"


def _lines(uses: _Uses) -> _Entries:
    yield "file:line", (
        "the model's own line behind an op, and its layer inside the block named above; after ';' "
        "why a pass put it there"
    )


def _notes(uses: _Uses) -> _Entries:
    program = uses.program
    yield from (("note", note) for note in program.notes)


_ENTRIES = (
    _lengths, _batches, _own_sizes, _split_dims, _axes, _chunks, _transfers, _attention, _experts,
    _weights, lambda uses: legend_entries(uses.calls), _lines, _notes,
)


# -- the end -------------------------------------------------------------------------------------


def summary(program: Program) -> list[str]:
    """What the program sends and receives in one run, and how many ops of each name it has."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    counts = sorted(Counter(map(op_name, calls)).items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count}{_NO_BREAK}{name}" for name, count in counts)
    lines = [] if program.mesh is None else _communication(program, calls)
    return [*lines, *_filled(f"{len(calls)} ops  ", named)]


def _communication(program: Program, calls: list[fx.Node]) -> list[str]:
    rows = []
    for target, describe in _TRAFFIC.items():
        nodes = [node for node in calls if target_name(node.target) == target]
        if nodes:
            rows.append((op_name(nodes[0]), describe(program, nodes)))
    if not rows:
        return ["in one run this rank sends nothing"]
    width = max(len(name) for name, _ in rows) + 2
    return ["in one run this rank", *(f"  {name:<{width}}{text}" for name, text in rows)]


def _shifts(program: Program, nodes: list[fx.Node]) -> str:
    sent = [node.args[0] for node in nodes if node.kwargs["to"] is not None]
    received = [node for node in nodes if node.kwargs["source"] is not None]
    return (
        f"sends {_count(sent, 'message')}, {_total(program, sent)} bytes, and receives "
        f"{_count(received, 'message')}, {_total(program, received)} bytes"
    )


def _gathers(program: Program, nodes: list[fx.Node]) -> str:
    shares = _total(program, [node.args[0] for node in nodes])
    return f"sends {_count(nodes, 'share')}, {shares} bytes, to each other rank, receives theirs"


def _rings(program: Program, nodes: list[fx.Node]) -> str:
    """Not lowered yet: to how many ranks keys and values go depends on who sees them."""
    operands = [operand for node in nodes for operand in node.args[1:3]]
    assert program.mesh is not None
    axes = str(nodes[0].kwargs["axis"]).split(",")
    across = [axis for axis in axes if axis != TIME]
    if not across:
        return f"has {_count(nodes, 'block')} of keys and values of every piece, sends nothing"
    others = program.mesh.size(",".join(across)) - 1
    often = f"to {others} other rank" if others == 1 else f"to up to {others} other ranks"
    if len(across) < len(axes):
        often = f"of every piece, {often} for each piece that sees it"
    said = (
        f"sends {_count(nodes, 'block')} of keys and values, {_total(program, operands)} "
        f"bytes, each {often}"
    )
    tile = nodes[0].kwargs.get("tile")
    return said if tile is None else f"{said}; gathers queries and reduces results along {tile}"


def _count(nodes: Sequence[Any], word: str) -> str:
    return f"{len(nodes)} {word}" if len(nodes) == 1 else f"{len(nodes)} {word}s"


def _total(program: Program, nodes: Sequence[Any]) -> str:
    total = sympy.expand(sum((num_bytes(program, node) for node in nodes), sympy.Integer(0)))
    known = expr.bind(expr.simplify(total), program.lengths)
    return f"{known:,}" if isinstance(known, int) else str(known)


_TRAFFIC = {RING_ATTENTION: _rings, SHIFT: _shifts, GATHER: _gathers}


def _filled(label: str, text: str) -> list[str]:
    """Lines of at most `WIDTH`, the label in front of the first."""
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label),
        break_long_words=False, break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines or [label.rstrip()]]
