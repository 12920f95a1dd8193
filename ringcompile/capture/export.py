"""From an nn.Module to a Program: torch.export, then our own graph without torch's symbols.

Capture is non-strict and runs no decomposition, so that `linear` and attention stay whole. Lengths
stay symbolic. Weights become names: no data is copied or even read.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from ringcompile.capture import huggingface
from ringcompile.capture.export_errors import FixedLengthError, explained
from ringcompile.capture.flat_call import FlatCall, unwrapped
from ringcompile.capture.guards import allowed_lengths
from ringcompile.capture.importer import Importer
from ringcompile.capture.regions import written_out
from ringcompile.capture.same_as_eager import compare
from ringcompile.capture.source_lines import all_frames
from ringcompile.capture.surroundings import unchanged, without_casts_of_modules, without_logs
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import depends_on_data, unbacked
from ringcompile.ir.program import Program


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    compare_with_eager: bool = True,
) -> Program:
    """Capture a model for any sequence length.

    Args:
        model: an ordinary module, in eval mode; its parameters may be fake tensors.
        args: example inputs by position. The length of dim 1 of the first tensor is the sequence
            length; every other input dim (but dim 0) of that size is taken to be one too.
        kwargs: example inputs by name; their tensors come behind those of `args`.
        name: what to call the program; the module's class by default.
        compare_with_eager: run the example through the model and through what was captured, and
            refuse where they differ; two forward passes. Not done where weights are not loaded,
            which a note says.

    Raises:
        RingCompileError: the model cannot be captured: control flow or sizes that depend on data, a
            length that the code fixes, state that a call would change; or what was captured
            computes something else than the model does when it is called.
    """
    model = unwrapped(model)
    call = FlatCall(model, args, kwargs or {})
    return _capture(call, name or type(model).__name__, compare_with_eager)


def _capture(call: FlatCall, name: str, compare_with_eager: bool) -> Program:
    model = call.model
    length = _example_length(call.example)
    notes = huggingface.caveats(model, call.example)
    with without_logs(), unchanged(model), huggingface.prepared(model):
        try:
            exported = _export(call, _dynamic_shapes(call.example, length))
            lengths = _allowed_lengths(exported, length)
        except FixedLengthError as error:
            exported = _export(call, _dynamic_shapes(call.example, None))
            lengths = _length_range(exported)
            where = f"{error.location.short}: " if error.location else ""
            notes = (*notes, f"{where}{error.message}, {length}")
        with _tracing():
            exported = written_out(exported)
    program = Importer(exported, call).program(name)
    if compare_with_eager:
        with without_logs(), unchanged(model), huggingface.without_cache(model):
            notes = (*notes, *compare(call, exported))
    return program.with_graph(
        program.graph, notes=notes, length_range=lengths, tp_plan=huggingface.tp_plan(model)
    )


def _example_length(example: Mapping[str, torch.Tensor]) -> int | None:
    """The length of the example sequence; None where the first input holds no tokens."""
    first = next(iter(example.values()), None)
    if first is None or first.dim() < 2:
        raise RingCompileError(
            "the first example input must be a tensor with the sequence as its dim 1",
            hint="pass for example token ids of shape [batch, sequence]",
        )
    if first.dim() > 3:  # an image: how many tokens it becomes is the model's to say
        return None
    length = first.shape[1]
    if length < 2:
        raise RingCompileError(f"the example sequence has length {length}; use at least 2")
    return int(length)


def _dynamic_shapes(
    example: Mapping[str, torch.Tensor], length: int | None
) -> dict[str, dict[int, Any] | None]:
    """What torch.export takes for a length, by input and dim."""
    return {name: _dynamic_dims(tensor, length) for name, tensor in example.items()}


def _dynamic_dims(tensor: torch.Tensor, length: int | None) -> dict[int, Any] | None:
    if length is None:
        return None
    found = {i: Dim.DYNAMIC for i, size in enumerate(tensor.shape) if i and size == length}
    if tensor.is_floating_point() and tensor.dim() == 3 and len(found) > 1:
        raise RingCompileError(
            f"the example length {length} is also a feature size: which dim is the sequence?",
            hint="choose an example length that no other size of the inputs equals",
        )
    return found


def _export(call: FlatCall, shapes: Mapping[str, Any]) -> ExportedProgram:
    example = tuple(call.example.values())
    with _tracing(), without_casts_of_modules(), all_frames():
        return export(call, example, dynamic_shapes=dict(shapes), strict=False)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """While inside, no gradients are kept, and what torch raises becomes an error of ours."""
    printed = io.StringIO()  # torch prints the graph as far as it came before it raises
    try:
        with (
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed),
            torch.no_grad(), warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", module=r"torch\.")  # of torch's own making
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except RingCompileError:
        raise
    except Exception as error:  # torch.export raises many kinds; each becomes one of ours
        raise explained(error) from error
    print(printed.getvalue(), end="")


def _allowed_lengths(exported: ExportedProgram, example: int | None) -> tuple[int, int | None]:
    """The lengths that the captured code is right for; where there is no example, any."""
    found = _length_range(exported)
    if example is None:
        return found
    allowed = allowed_lengths(exported, example, *found)
    if allowed is None:
        raise FixedLengthError(
            "the model's code fixes the sequence length to that of the example",
            hint="a size was turned into a number: torch.export kept "
            f"{'; '.join(exported._guards_code)[:200]}",
        )
    return allowed


def _length_range(exported: ExportedProgram) -> tuple[int, int | None]:
    """What torch says of the sizes of inputs; sizes that data tell have ranges too."""
    low, high = 2, None
    for free, limits in exported.range_constraints.items():
        if not depends_on_data(unbacked(free.name)):
            low = max(low, int(limits.lower)) if limits.lower.is_Integer else low
            high = int(limits.upper) if limits.upper.is_Integer else None
    return low, high if high is None or high < 2**40 else None
