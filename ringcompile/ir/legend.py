"""What a reader has to know to follow a dump: who the program is for, its symbols, what it sends.

Plain lines without comment marks, for the text form and the Python view alike.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import sympy
from torch import fx

from ringcompile.ir import expr
from ringcompile.ir.calls import Call
from ringcompile.ir.communication import GATHER, SHIFT, num_bytes
from ringcompile.ir.layout import format_dim
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, ValueType, state_type

WIDTH = 100
_NO_BREAK = "\N{NO-BREAK SPACE}"
RING_ATTENTION = "ringcompile.ring_attention.default"


def op_name(node: fx.Node) -> str:
    """The short name of an op: `linear`, `ring.attention`, `operator.getitem`.

    Names of torch's own operators have no prefix and, as their arguments tell the overload, no
    overload. Ours that work along a mesh axis have that axis in front, which also tells
    `ring.gather` from torch's `gather`.
    """
    parts = str(node.target).split(".")
    if not hasattr(node.target, "_schema"):
        return f"{node.target.__module__}.{node.target.__name__}".removeprefix("_")  # type: ignore[union-attr]
    if parts[0] == "aten":
        return parts[1]
    if parts[0] != "ringcompile":
        return ".".join(parts[:2])
    axis = Call(node).get("axis")
    return f"{axis}.{parts[1].removeprefix(f'{axis}_')}" if axis else parts[1]


def is_state(value: ValueType | None) -> bool:
    """Whether a type is that of a state (out, lse) of attention."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and len(value[0].shape) == 4
        and value == state_type(value[0])
    )


def title(program: Program) -> list[str]:
    """Model, mesh, rank and passes."""
    parts = [f"model {program.name}"]
    if program.mesh is not None:
        parts.append(f"mesh {program.mesh}")
    if program.sequence is not None:
        parts.append(f"order {program.sequence.order}")
    parts.append(_rank(program))
    return ["   ".join(parts), *_wrapped("passes  ", ", ".join(program.passes))]


def _rank(program: Program) -> str:
    if program.mesh is None:
        return "one device"
    if program.coordinates is None:
        return "every rank"
    number = program.mesh.rank(program.coordinates)
    where = ", ".join(f"{axis}={at}" for axis, at in program.coordinates.items())
    return f"rank {number} of {program.mesh.world_size} ({where})"


def legend(program: Program) -> list[str]:
    """The symbols and words that this program's text uses, one or a few lines each."""
    entries = list(_entries(program))
    width = max((len(term) for term, _ in entries), default=0) + 2
    return [line for term, text in entries for line in _wrapped(f"{term:<{width}}", text)]


def _entries(program: Program) -> Iterator[tuple[str, str]]:
    symbols, nodes = used_symbols(program), list(program.graph.nodes)
    if expr.SEQUENCE in symbols:
        yield expr.SEQUENCE, f"length of the sequence in tokens, {_range(program)}"
    for other in sorted(symbols & set(expr.OTHER_LENGTHS)):
        yield other, "another length of the inputs"
    if expr.LOCAL in symbols or _splits_sequence(program):
        yield expr.LOCAL, _share(program)
    yield from ((term, text) for term, text in _split_dims(program))
    if program.sequence is not None and _takes(nodes, {"chunks", "queries"}):
        yield "chunks", _chunks(program)
    for axis in program.mesh.names if program.mesh is not None else ():
        if axis in symbols:
            last = program.mesh.size(axis) - 1  # type: ignore[union-attr]
            yield axis, f"this rank's coordinate on mesh axis {axis}, 0 to {last}"
        if any(op_name(node).startswith(f"{axis}.") for node in _calls(program)):
            yield f"{axis}.op", f"an op that communicates along mesh axis {axis}"
    if _takes(nodes, {"to", "source"}):
        yield "to, source", "whom a rank sends to and whom it receives from; None: nobody"
    if any(is_state(node.meta.get("type")) for node in nodes):
        yield "state", (
            "attention over some of the keys: out, of the shape shown, and for each of its rows "
            "lse, the logarithm of the sum of the exponentials of its scores"
        )
    yield "file:line", (
        "the model's own line behind an op, and its layer inside the block named above; behind ';' "
        "why a pass put it there"
    )
    if program.weights:
        total = sum(weight.num_bytes for weight in program.weights.values())
        yield "@name", f"one of {len(program.weights)} weights, {total:,} bytes together"
    if program.lengths:
        yield "fixed", ", ".join(f"{name} = {n}" for name, n in sorted(program.lengths.items()))
    for note in program.notes:
        yield "note", note


def _range(program: Program) -> str:
    low, high = program.length_range
    return f"{low} to {high}" if high is not None else f"at least {low}"


def _share(program: Program) -> str:
    if program.sequence is None:
        return "tokens that a rank holds"
    sequence = program.sequence
    return (
        f"tokens that a rank holds: s, padded to a multiple of {sequence.num_chunks}, over "
        f"{sequence.num_ranks} ranks"
    )


def _split_dims(program: Program) -> Iterator[tuple[str, str]]:
    """`s/ring` and what else is split, each once."""
    seen: dict[str, str] = {}
    for type_ in _types(program):
        for atom in (atom for dim in type_.layout.dims for atom in dim if atom.axes):
            term = format_dim(None, (atom,))
            axes = " and ".join(atom.axes)
            text = f"a dim of {atom.size}, split over mesh axis {axes}"
            sequence = program.sequence
            if sequence is not None and expr.equal(atom.size, sequence.length):
                text += f": a rank holds {expr.LOCAL} of it"
            seen.setdefault(term, text)
    yield from seen.items()


def _splits_sequence(program: Program) -> bool:
    return any(program.sequence is not None and type_.layout.axes for type_ in _types(program))


def _chunks(program: Program) -> str:
    sequence = program.sequence
    assert sequence is not None
    rank: Any = expr.coordinate(sequence.axis)
    if program.coordinates is not None:
        rank = program.coordinates[sequence.axis]
    held = " and ".join(map(str, sequence.chunks(rank)))
    whose = "this rank" if program.coordinates is not None else f"rank {rank}"
    return (
        f"the padded sequence is cut into chunks 0 to {sequence.num_chunks - 1} of "
        f"{sequence.chunk} tokens; {whose} holds {held}; nobody sees a key of the padding"
    )


def _takes(nodes: list[fx.Node], names: set[str]) -> bool:
    """Whether one of our ops has an argument of these names."""
    ours = (node for node in nodes if str(node.target).startswith("ringcompile."))
    return any(names & set(Call(node).arguments) for node in ours)


def _calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _types(program: Program) -> Iterator[TensorType]:
    for node in program.graph.nodes:
        value = node.meta.get("type")
        yield from value if isinstance(value, tuple) else () if value is None else (value,)


def used_symbols(program: Program) -> set[str]:
    """The names of all symbols in the program's types and arguments."""
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, sympy.Basic):
            found.update(symbol.name for symbol in value.free_symbols)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for node in program.graph.nodes:
        visit((*node.args, *node.kwargs.values()))
    for type_ in _types(program):
        visit(type_.shape)
        visit([atom.size for dim in type_.layout.dims for atom in dim])
    return found


def summary(program: Program) -> list[str]:
    """What the program sends and receives in one run, and how many ops of each name it has."""
    calls = _calls(program)
    counts = Counter(map(op_name, calls))
    named = ", ".join(
        f"{count}{_NO_BREAK}{name}" for name, count in sorted(counts.items(), key=lambda i: (-i[1], i[0]))
    )
    lines = [] if program.mesh is None else _communication(program, calls)
    return [*lines, *_wrapped(f"{len(calls)} ops  ", named)]


def _communication(program: Program, calls: list[fx.Node]) -> list[str]:
    rows = [
        (op_name(group[0]), text)
        for target, describe in _TRAFFIC.items()
        if (group := [node for node in calls if str(node.target) == target])
        for text in describe(program, group)
    ]
    if not rows:
        return ["sends nothing"]
    width = max(len(name) for name, _ in rows) + 2
    return ["in one run a rank", *(f"  {name:<{width}}{text}" for name, text in rows)]


def _shifts(program: Program, nodes: list[fx.Node]) -> Iterator[str]:
    sent: list[Any] = [node.args[0] for node in nodes if node.kwargs["to"] is not None]
    received = [node for node in nodes if node.kwargs["source"] is not None]
    yield (
        f"sends {len(sent)} times, {_total(program, sent)} bytes; "
        f"receives {len(received)} times, {_total(program, received)} bytes"
    )


def _gathers(program: Program, nodes: list[fx.Node]) -> Iterator[str]:
    shares: list[Any] = [node.args[0] for node in nodes]
    yield (
        f"sends {len(nodes)} shares, {_total(program, shares)} bytes, to every other rank and "
        "receives theirs"
    )


def _rings(program: Program, nodes: list[fx.Node]) -> Iterator[str]:
    """Not lowered yet: what each rank will see decides how far keys and values travel."""
    keys_values: list[Any] = [operand for node in nodes for operand in node.args[1:3]]
    assert program.mesh is not None
    times = program.mesh.size(str(nodes[0].kwargs["axis"])) - 1
    yield (
        f"passes on {len(nodes)} blocks of keys and values, {_total(program, keys_values)} "
        f"bytes, up to {times} times each"
    )


def _total(program: Program, nodes: list[fx.Node]) -> str:
    total = sympy.expand(sum(num_bytes(program, node) for node in nodes))
    bound = expr.bind(expr.simplify(total), program.lengths)
    return f"{bound:,}" if isinstance(bound, int) else str(bound)


_TRAFFIC = {RING_ATTENTION: _rings, SHIFT: _shifts, GATHER: _gathers}


def _wrapped(label: str, text: str) -> list[str]:
    indent = " " * len(label)
    lines = textwrap.wrap(
        text, WIDTH - 3, initial_indent=label, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines or [label.rstrip()]]
