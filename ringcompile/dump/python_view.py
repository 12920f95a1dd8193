"""A program as Python that people read: one function, one statement a node.

The view is valid Python over names that a reader knows, but nothing imports or executes it:
programs are saved as JSON, and run by `runtime/executor.py`.
"""

from __future__ import annotations

import builtins
import itertools
import json
import keyword
import operator
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
import torch
from sympy.core.function import Application
from torch import fx

from ringcompile.errors import SourceLocation
from ringcompile.ir import expr
from ringcompile.ir.call_text import elided, given_arguments, python_name, symbols_of
from ringcompile.ir.calls import target_name
from ringcompile.ir.group_text import note_of
from ringcompile.ir.legend import legend, rank_text, title
from ringcompile.ir.nodes import kinds_of_nodes, location_of
from ringcompile.ir.printer import block_at, runs_of_blocks, type_text
from ringcompile.ir.program import Program
from ringcompile.ir.stretched import Section, sections_of
from ringcompile.ir.templates import Said, Templates
from ringcompile.ir.types import SequenceSplit, ValueType
from ringcompile.ops import schemas

_RESERVED = {"inputs", "state", "weights", "comm", "torch", "aten", "ours", "operator", "step"}
_AFFIX = re.compile(r"_(default|tensor|scalar|dtype|int)(?=_\d+$|$)", re.IGNORECASE)
_MATH_NAMES = ("ceil", "floor", "log", "log2", "sqrt")
_MATH = re.compile(rf"(?<![.\w])({'|'.join(_MATH_NAMES)})\(")
_NOWHERE = SourceLocation()
_INDENT = " " * 4
_WIDTH, _MAX_CODE = 100, 84
_NOTICE = "A view for reading: ringcompile never imports or executes this file."
# Terms of the legend that stand in another form here.
_NOT_HERE = ("@name", "file:line", "ring.op", "{ ... }")


def python_view(program: Program) -> str:
    """The readable Python of a program, usually that of one rank; ends with a newline."""
    head = [*title(program, "constructed by"), "", _NOTICE, "", *legend(program, _NOT_HERE)]
    body = _View(program).body()
    functions = _functions(body)
    return "\n".join([
        *(f"# {line}".rstrip() for line in head),
        "",
        *([f"from math import {', '.join(functions)}", ""] if functions else []),
        "import torch",
        "",
        "aten, ours = torch.ops.aten, torch.ops.ringcompile",
        "",
        "",
        f"def step(inputs, {'state, ' if program.state else ''}weights, comm):",
        f'{_INDENT}"""One run on {rank_text(program)}.',
        "",
        f"{_INDENT}Args:",
        f"{_INDENT * 2}inputs: tensors by name; of what is split, this rank's share.",
        *([f"{_INDENT * 2}state: what the rank keeps between calls, or is told for this one."]
          if program.state else []),
        f"{_INDENT * 2}weights: tensors by qualified name.",
        f"{_INDENT * 2}comm: knows the lengths, and sends along the axes of the mesh.",
        f'{_INDENT}"""',
        *body,
        "",
    ])


def _functions(lines: Sequence[str]) -> list[str]:
    """The functions of Python's math that statements call."""
    text = "\n".join(lines)
    named = [f"{name}(" for name in _MATH_NAMES if f"{name}(" in text]
    where = [line for line in lines if any(name in line for name in named)]
    return sorted({name for line in where for name in _MATH.findall(line)})


class _Statement(NamedTuple):
    """A line of code, what is noted behind it, and the user's line that it comes from."""

    code: str
    note: str = ""
    location: SourceLocation = _NOWHERE


class _View:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.sections = sections_of(program.graph)
        kinds = kinds_of_nodes(program.graph)
        used = {name for n in kinds if n.op == "call_function" for name in symbols_of(n)}
        shares = set(expr.SHARES.values())
        for split in self._splits:  # a rank's share follows from the length
            if split.share in used and expr.is_symbolic(split.length):
                used |= expr.symbols_in(split.length)
        self.symbols = sorted(used, key=lambda name: (name in shares, name))
        self.names = self._names()
        self.types: dict[ValueType | None, str] = {}  # their texts
        self.notes: dict[fx.Node, str] = {}
        self.templates = Templates(_code)

    @property
    def _splits(self) -> tuple[SequenceSplit, ...]:
        """How each length that is divided is."""
        sequence = self.program.sequence
        return () if sequence is None else (sequence, *sequence.others)

    def _names(self) -> dict[str, str]:
        """Identifiers: the graph's names without overloads, distinct from all else."""
        taken = {*_RESERVED, *self.symbols, *keyword.kwlist, *dir(builtins)}
        names: dict[str, str] = {}
        for given in self._given():
            if given in self.program.weights:
                names[given] = f"weights[{json.dumps(self.program.weights[given].name)}]"
                continue
            clean, base = _stems(given)
            if clean in taken:
                numbered = (f"{base}_{i}" for i in itertools.count(1))
                named = itertools.chain((base,), numbered)
                clean = next(name for name in named if name not in taken)
            names[given] = clean
            taken.add(clean)
        return names

    def _given(self) -> Iterator[str]:
        """The graph's names, in order."""
        for section in self.sections:
            yield from (section.names[node] for node in section.nodes if node.op != "output")

    def body(self) -> list[str]:
        lines = self._aligned([*self._inputs(), *map(self._length, self.symbols)])
        statements = [made for section in self.sections for made in self._statements(section)]
        for block, run in runs_of_blocks(statements, lambda made: made.location.layer, below=1):
            lines += ["", f"{_INDENT}# {_heading(block, [made.location for made in run])}"]
            lines += self._aligned(run)
        *_, last = self.sections
        returned = [self.names[last.names[node]] for node in last.nodes[-1].args[0]]  # type: ignore
        value = self.program.output_structure.build(returned, repr) if returned else ()
        return [*lines, "", f"{_INDENT}return {_nested(value)}"]

    # -- statements, each with what is noted behind it -------------------------------------------

    def _inputs(self) -> list[_Statement]:
        return [
            _Statement(f'{self.names[node.name]} = {self._taken_from(node)}["{node.name}"]',
                       self._note(node))
            for section in self.sections for node in section.nodes
            if node.op == "placeholder" and node.name not in self.program.weights
        ]

    def _taken_from(self, node: fx.Node) -> str:
        return "state" if node.name in self.program.state else "inputs"

    def _length(self, name: str) -> _Statement:
        sequence, mesh = next((s for s in self._splits if s.share == name), None), self.program.mesh
        if name in self.program.lengths:
            return _Statement(f"{name} = {self.program.lengths[name]}")
        if sequence is not None:
            length = expr.to_text(sequence.length)
            length = f"({length})" if " " in length else length
            chunk = f"-(-{length} // {sequence.num_chunks})"
            times = f" * {sequence.chunks_per_piece}" if sequence.chunks_per_piece > 1 else ""
            what = "tokens that this rank holds"
            if sequence.num_pieces > 1:
                what += " of a piece" if sequence.across else ", one piece after another"
            return _Statement(f"{name} = {chunk}{times}", what)
        if mesh is not None and name in mesh.names:
            return _Statement(f'{name} = comm.coordinate("{name}")', "of this rank")
        return _Statement(f'{name} = comm.length("{name}")')

    def _statements(self, section: Section) -> list[_Statement]:
        """The calls of a section."""
        names, own, quoted = self.names, section.names, dict[str, str]()

        def said(value: Any) -> str:
            if isinstance(value, fx.Node):
                return names[own[value]]
            if value not in quoted:
                quoted[value] = json.dumps(section.text(value))
            return quoted[value]

        calls = [node for node in section.nodes if node.op == "call_function"]
        texts = self.templates.texts(replace(section, nodes=calls), said, said)
        return [
            _Statement(text, self._note(node), section.location(location_of(node)))
            for text, node in zip(texts, calls, strict=True)
        ]

    def _note(self, node: fx.Node) -> str:
        if node not in self.notes:
            type_ = node.meta.get("type")
            if type_ not in self.types:
                self.types[type_] = type_text(self.program, type_)
            parts = (self.types[type_], node.meta.get("why"), note_of(node))
            self.notes[node] = "; ".join(filter(None, parts))
        return self.notes[node]

    @staticmethod
    def _aligned(statements: list[_Statement]) -> list[str]:
        """Statements, long ones on several lines, with their notes below each other."""
        widths = (len(made.code) for made in statements)
        width = max((width for width in widths if width <= _MAX_CODE), default=0)
        lines = []
        for code, note, _ in statements:
            comment = f"  # {note}" if note else ""
            if len(code) <= _MAX_CODE or "(" not in code:
                lines.append(f"{_INDENT}{code:<{width}}{comment}".rstrip())
                continue
            head, rest = code.split("(", 1)
            lines += [f"{_INDENT}{head}(", *_wrapped(rest[:-1]), f"{_INDENT}){comment}"]
        return lines


def _heading(block: str, run: list[SourceLocation]) -> str:
    """The layer, and from where to where the model's own lines reach."""
    own = [location for location in run if block_at(location.layer, 1) == block]
    layers = dict.fromkeys(location.layer for location in own)
    name = block or ", ".join(filter(None, layers)) or "the model itself"
    if not block and len(layers) > 1:
        return name
    files: dict[str, list[int]] = {}
    for location in own:
        if location.file:
            files.setdefault(location.file.rpartition("/")[2], []).append(location.line)
    spans = (
        f"{file}:{min(lines)}" + (f"-{max(lines)}" if len(set(lines)) > 1 else "")
        for file, lines in files.items()
    )
    where = ", ".join(spans)
    return f"{name} ({where})" if where else name


def _code(node: fx.Node, said: Said) -> str:
    """A call as a statement."""
    if node.target is operator.getitem:
        source, index = (_value(value, said) for value in node.args)
        return f"{said(node)} = {source}[{index}]"
    arguments, named = [], False
    for argument in given_arguments(node):
        named = named or argument.is_named
        text = _value(argument.value, said)
        arguments.append(f"{argument.name}={text}" if named else text)
    return f"{said(node)} = {_function(node.target)}({', '.join(arguments)})"


def _value(value: Any, said: Said) -> str:
    match value:
        case fx.Node() | str():
            return str(said(value))
        case int() | None:
            return str(value)
        case list() | tuple():
            return f"[{', '.join(elided([_value(item, said) for item in value]))}]"
        case sympy.Expr():
            return _size(value)
        case float():
            finite = value == value and abs(value) != float("inf")
            return repr(value) if finite else f'float("{value}")'
        case torch.device():
            return json.dumps(str(value))
    return str(value)


@lru_cache(maxsize=65536)  # ranks call most of their values the same
def _stems(name: str) -> tuple[str, str]:
    """A name of the graph without overloads, and without its number."""
    clean = _AFFIX.sub("", name)
    return clean, clean.rstrip("0123456789").rstrip("_") or clean


def _wrapped(text: str) -> list[str]:
    """The arguments of a call on lines of their own; what holds other white space goes slowly."""
    indent = _INDENT * 2
    words = text.split(" ")
    if "" in words or words != text.split():
        return textwrap.wrap(
            text, _WIDTH, initial_indent=indent, subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )
    lines = [indent + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= _WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return lines


@lru_cache(maxsize=4096)
def _function(target: Any) -> str:
    """`aten.linear`, `ours.pack`, `comm.wait`."""
    if schemas.name_of(target) in schemas.COMMUNICATION:
        return f"comm.{schemas.name_of(target)}"
    if not hasattr(target, "_schema"):
        return python_name(target)
    namespace, name = target_name(target).split(".")[:2]
    if namespace == schemas.NAMESPACE:
        return f"ours.{name}"
    return f"{namespace}.{name}" if namespace == "aten" else f"torch.ops.{namespace}.{name}"


@lru_cache(maxsize=65536)  # sympy takes long to print; a program has few sizes, many times
def _size(size: sympy.Expr) -> str:
    """A size as Python; quotients outside functions are whole numbers."""
    if size.atoms(Application):
        return str(sympy.pycode(size, fully_qualified_modules=False))
    return str(size).replace("/", " // ")


def _nested(value: Any) -> str:
    """Nested outputs, the leaves as they are."""
    if isinstance(value, dict):
        items = (f"{json.dumps(key)}: {_nested(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, tuple):
        inner = ", ".join(map(_nested, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(_nested, value))}]"
    return str(value)
