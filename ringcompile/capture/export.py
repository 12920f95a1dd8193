"""From an nn.Module to a Program: torch.export, then our own graph without torch's symbols.

Capture is non-strict and takes apart no op that has a rule, so that `linear` and attention stay
whole. Batch and length stay symbolic. Weights become names: no data is copied or even read.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, export

from ringcompile.capture import huggingface
from ringcompile.capture.alike import same_for_one_sequence
from ringcompile.capture.associative_scan import read_as_scans
from ringcompile.capture.decompose import known_ops_only
from ringcompile.capture.dims import (
    BATCH,
    LENGTHS,
    OTHERS,
    SEQUENCE,
    Dims,
    Example,
    read_example,
    widened,
)
from ringcompile.capture.export_errors import explained
from ringcompile.capture.few import FEW, Few, refused
from ringcompile.capture.flat_call import FlatCall, unwrapped
from ringcompile.capture.flex_attention import read_as_attention
from ringcompile.capture.guards import Guards, Range
from ringcompile.capture.importer import Importer, check_writes
from ringcompile.capture.known_values import asks_for_values, known, may_be_known, notes_on
from ringcompile.capture.math_of_sizes import math_of_sizes
from ringcompile.capture.plain_weights import with_plain_weights
from ringcompile.capture.regions import written_out
from ringcompile.capture.remembered_sizes import sizes_remembered
from ringcompile.capture.same_as_eager import NOT_COMPARED, compare, has_data
from ringcompile.capture.sizes import SYMBOLS, Sizes, read_sizes, read_squeezed
from ringcompile.capture.source_lines import all_frames, location_of_error
from ringcompile.capture.specialised import Lines, specialised
from ringcompile.capture.surroundings import (
    only_what_is_read,
    unchanged,
    without_casts_of_modules,
    without_logs,
    without_looks_at_masks,
)
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.program import Program


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    dims: Dims | None = None,
    compare_with_eager: bool = True,
) -> Program:
    """Capture a model as a graph, for any batch and any sequence length.

    Args:
        model: a module in eval mode; its parameters may be fake tensors.
        args: example inputs by position; one sequence is enough. Without `dims`, the first tensor
            is taken to be [batch, sequence, ...] (one of four dims for images, whose length is the
            model's own), and dims of other inputs to be the batch or the sequence where their sizes
            are the same and the code treats them so. Another length in dim 1 of other inputs, as of
            a decoder's tokens, varies by itself.
        kwargs: example inputs by name; their tensors come behind those of `args`.
        name: what to call the program; the module's class by default.
        dims: for inputs by name what their dims are: "batch", "sequence", "fixed", or "sequence2"
            to "sequence4" for further lengths; dims that are not listed are fixed, inputs that are
            not listed are read as above.
        compare_with_eager: run the example through the model and through what was captured, and
            refuse where they differ; two forward passes. Not done where weights are not loaded,
            which a note says.

    Raises:
        RingCompileError: the model cannot be captured: control flow or sizes that depend on data,
            state that a call would change, or `dims` that do not fit the inputs; or what was
            captured computes something else than the model does when it is called.
    """
    model = with_plain_weights(unwrapped(model))
    call = FlatCall(model, args, kwargs or {})
    example = read_example(call.example, dims)
    notes = (*huggingface.caveats(model, call.example), *example.notes)
    with without_logs():
        found = _traced(call, example, notes)
        found = _from_one_sequence(call, example, found, compare_with_eager)
        if compare_with_eager:
            found = _compared(call, found)
    return replace(
        found.program(call, name or type(model).__name__),
        notes=found.notes,
        length_range=found.ranges.get(SEQUENCE, (2, None)),
        batch_range=found.ranges.get(BATCH, (1, None)),
        other_ranges={
            name: found.ranges[role] for name, role in LENGTHS.items()
            if role in OTHERS and role in found.ranges
        },
        tp_plan=huggingface.tp_plan(model),
    )


@dataclass(frozen=True)
class _Captured:
    """A model as torch.export gives it, and for which sizes it is right.

    Attributes:
        exported: the graph.
        example: the inputs as the caller passes them, and what their dims turned out to be.
        sizes: what torch's symbols mean.
        ranges: for each role that varies the smallest and the largest size.
        notes: what the caller should know.
        about_one: the first line that does something else for one sequence.
    """

    exported: ExportedProgram
    example: Example
    sizes: Sizes
    ranges: dict[str, Range]
    notes: tuple[str, ...]
    about_one: SourceLocation | None = None

    def program(self, call: FlatCall, name: str = "") -> Program:
        """The graph as a program of ours."""
        values = {leaf.name: tuple(leaf.tensor.flatten().tolist()) for leaf in self.example.leaves
                  if leaf.name in self.example.known}
        return Importer(self.exported, call, self.sizes.symbols, values).program(name)

    def few(self, call: FlatCall) -> Few:
        """What tries small sizes by numbers."""
        return Few(call, self.exported, self.example, self.sizes)

    def with_range(self, role: str, found: Range | None, notes: tuple[str, ...]) -> _Captured:
        """The same for another range of sizes, with more notes."""
        ranges = self.ranges if found is None else {**self.ranges, role: found}
        return replace(self, ranges=ranges, notes=(*self.notes, *notes))


def _traced(call: FlatCall, example: Example, notes: tuple[str, ...]) -> _Captured:
    """The model as a graph of ops that have rules, for the sizes that torch is sure of."""
    with unchanged(call.model), huggingface.prepared(call.model):
        found = _settled(call, example, notes)
        with _tracing():
            exported = known_ops_only(written_out(found.exported))
        check_writes(exported)
        return replace(found, exported=exported)


@contextlib.contextmanager
def _called(call: FlatCall) -> Iterator[None]:
    """The surroundings in which the user calls the model."""
    with unchanged(call.model), huggingface.without_cache(call.model):
        yield


def _from_one_sequence(
    call: FlatCall, example: Example, found: _Captured, by_numbers: bool
) -> _Captured:
    """The program for one sequence and more, where one is computed alike; else for the example's.

    Where weights may not be used, one sequence is computed alike if its graph is the same.
    """
    low, high = found.ranges.get(BATCH, (1, None))
    if low == 1:
        return found
    if by_numbers and has_data(call.model):
        with _called(call):
            range_, notes = found.few(call).smallest(BATCH, found.ranges)
    else:
        range_, notes = (1, high), ()
        alone = _traced(call, found.example.of_one_sequence(), ())
        if low > 2 or not same_for_one_sequence(found.program(call), alone.program(call)):
            range_ = (low, high)
            notes = (_OTHER_GRAPH,)
    where = f"{found.about_one.short}: " if found.about_one else ""
    if range_ == (1, high) or example.batch != 1:
        return found.with_range(BATCH, range_, tuple(where + note for note in notes))
    notes = (*found.notes, f"{where}{_FIXES[BATCH]}, 1")
    return _traced(call, found.example.fixed(BATCH), notes)


_OTHER_GRAPH = (
    f"{refused(BATCH, 1)}: the graph for it is different, and without weights the numbers of the "
    "two graphs cannot be compared"
)


def _compared(call: FlatCall, found: _Captured) -> _Captured:
    """The program, down to the shortest sequences, once it is known to be the model's."""
    with _called(call):
        notes = compare(call, found.exported)
        found = replace(found, notes=(*found.notes, *notes))
        if any(note.startswith(NOT_COMPARED) for note in notes):
            return found
        for role in LENGTHS.values():
            found = found.with_range(role, *found.few(call).smallest(role, found.ranges))
        return found


def _settled(call: FlatCall, example: Example, notes: tuple[str, ...]) -> _Captured:
    """Export, and again for what the code turns out to fix, until nothing else is."""
    with specialised() as lines:
        try:
            exported, tried = _exported(call, example, lines)
        except RingCompileError as error:
            if found := _with_known(call, example, notes):
                return found
            if example.others:
                return _settled(call, example.of_one_length(), notes)
            if not isinstance(error, _AloneError):
                raise
            note = f"{_ONE_SEQUENCE}, {error.message}"
            where = f"{error.location.short}: " if error.location else ""
            return _settled(call, example.fixed(BATCH), (*notes, where + note))
    if asks_for_values(exported) and (found := _with_known(call, example, notes)):
        return found
    sizes = read_sizes(exported, tried)
    if sizes.tied:
        return _settled(call, example.of_one_length(), (*notes, *example.why_tied()))
    ranges, fixed = _ranges(exported, tried, sizes, lines)
    if BATCH in ranges and example.batch == 1 and ranges[BATCH][0] > FEW:
        fixed.append(BATCH)  # the example itself is computed in another way
    about_one = lines.about_one(sizes.names, BATCH)
    if not fixed and not sizes.loose:
        return _Captured(
            exported, example.with_roles(sizes.names), sizes, ranges, notes, about_one
        )
    for role in sorted(set(fixed), reverse=True):  # later lengths first: they move up
        line = lines.first(tried.dims_of(role)) or lines.about_one(sizes.names, role)
        text = f"{_fixes(example, role)}, {example.sizes[role]}"
        notes = (*notes, f"{line.short + ': ' if line else ''}{text}")
        example = example.fixed(role)
    return _settled(call, example.without_batch(sizes.loose), notes)


def _with_known(
    call: FlatCall, example: Example, notes: tuple[str, ...]
) -> _Captured | None:
    """The model exported with inputs of counts as constants; None where that does not help."""
    names = may_be_known(example)
    if example.known or not names:
        return None
    tried = example.with_known(names)
    try:
        return _settled(call, tried, (*notes, *notes_on(tried)))
    except RingCompileError:
        return None


_ONE_SEQUENCE = "the batch is fixed to that of the example, 1; with more sequences"
_FIXES = {
    BATCH: "the model's code fixes the batch to that of the example",
    SEQUENCE: "the model's code fixes the sequence length to that of the example",
}


def _fixes(example: Example, role: str) -> str:
    """What is fixed, as a note begins that says so."""
    if role in _FIXES:
        return _FIXES[role]
    names = [f"'{leaf.name}'" for leaf in example.leaves if leaf.dims_of(role)]
    return f"the model's code fixes the length of {' and '.join(names)} to that of the example"


def _exported(call: FlatCall, example: Example, lines: Lines) -> tuple[ExportedProgram, Example]:
    """The exported model, and the example it was exported with.

    With one sequence torch.export would see no batch: the example is widened, as far as the code
    takes several sequences.

    Raises:
        RingCompileError: the model cannot be exported; an _AloneError where that may be because
            the example was widened.
    """
    if example.batch != 1:
        return _export(call, example), example
    wide = widened(example, call)
    try:
        return _export(call, wide), wide
    except RingCompileError:
        lines.clear()
        wide = widened(example, call, sure=True)
    try:
        return _export(call, wide), wide
    except RingCompileError as error:
        raise _AloneError(error.message, location=error.location) from error


class _AloneError(RingCompileError):
    """What torch.export says of an example that was widened."""


def _ranges(
    exported: ExportedProgram, example: Example, sizes: Sizes, lines: Lines
) -> tuple[dict[str, Range], list[str]]:
    """For each role the sizes that the captured code is right for; and the roles that it fixes."""
    roles = {role: size for role, size in example.sizes.items() if role in sizes.names.values()}
    guards = Guards(exported, sizes.names, roles)
    fixed, squeezed = sorted(sizes.numbers, reverse=True), read_squeezed(exported, sizes)
    ranges: dict[str, Range] = {}
    for role in roles:
        low, high = _limits(exported, sizes, role)
        if role in squeezed or lines.about_one(sizes.names, role) is not None:
            low = max(low, 2)
        allowed = guards.allowed(role, low, high)
        if allowed is None:
            fixed.append(role)
        else:
            ranges[role] = allowed
    bound = None if fixed else guards.dependent(ranges)
    return ranges, fixed if bound is None else [bound]


def _limits(exported: ExportedProgram, sizes: Sizes, role: str) -> Range:
    """The range that torch gives the symbols of a role."""
    low, high = _SMALLEST[role], None
    for free, limits in exported.range_constraints.items():
        if str(sizes.symbols.get(free.name)) == SYMBOLS[role]:
            # Below 3, torch says so of every size: see specialised.py for what is meant.
            low = int(limits.lower) if limits.lower.is_Integer and limits.lower > 2 else low
            high = int(limits.upper) if limits.upper.is_Integer else high
    return low, high if high is None or high < 2**40 else None


_SMALLEST = {BATCH: 1, **dict.fromkeys(LENGTHS.values(), 2)}


def _export(call: FlatCall, example: Example) -> ExportedProgram:
    tensors = tuple(leaf.tensor for leaf in example.leaves)
    shapes = {leaf.name: leaf.dynamic for leaf in example.leaves}
    with (
        _tracing(), unchanged(call.model), without_casts_of_modules(), only_what_is_read(),
        all_frames(), read_as_attention(), read_as_scans(), without_looks_at_masks(),
        known(call, example.known),
    ):
        return export(call, tensors, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """While inside, no gradients are kept, and what torch raises becomes an error of ours."""
    printed = io.StringIO()  # torch prints the graph as far as it came before it raises
    try:
        with (
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed),
            torch.no_grad(), warnings.catch_warnings(), math_of_sizes(), sizes_remembered(),
        ):
            warnings.filterwarnings("ignore", module=r"torch\.")  # of torch's own making
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except RingCompileError as error:
        error.location = error.location or location_of_error(error)
        raise
    except Exception as error:  # torch.export raises many kinds; each becomes one of ours
        raise explained(error) from error
    print(printed.getvalue(), end="")
