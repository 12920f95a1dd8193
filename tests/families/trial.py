"""Try one family: compile for four ranks, run them in lock-step, compare with one device."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump import report
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import SEQUENCE, is_symbolic, symbols_in
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.families.family import Family
from tests.shares import products_of
from tests.support import TOLERANCE, run

SPEC = "ring=4"
# Captured at one length and run at another, which does not divide over the ranks.
CAPTURED, LENGTH = 24, 27
PADDED = 5
MATCHED, REFUSED, WRONG, CRASHED = "matched", "refused", "wrong", "crashed"


@dataclass(frozen=True)
class Outcome:
    """What became of a family, once.

    Attributes:
        kind: matched, refused, wrong or crashed.
        difference: the largest, of each output's scale max(1, largest value).
        reason: the error's message, or which output differs.
        line: the source line of that error, relative to its package.
    """

    kind: str
    difference: float = 0.0
    reason: str = ""
    line: str = ""


@dataclass(frozen=True)
class Trial:
    """What became of a family, all told.

    Attributes:
        plain: one sequence.
        padding: two sequences, one of them padded; None where the family takes no padding.
        any_length: whether the program serves other lengths than that of the example.
        forms: what attentions become, each with how many there are.
        masks: the kinds of mask, likewise.
        gathers: how many tensors are gathered whole.
        products: how many matrix products and convolutions there are beside attention.
        split: how many of them each rank computes for its own share only.
    """

    family: str
    plain: Outcome
    padding: Outcome | None = None
    any_length: bool = False
    forms: tuple[tuple[str, int], ...] = ()
    masks: tuple[tuple[str, int], ...] = ()
    gathers: int = 0
    products: int = 0
    split: int = 0


class _TimeoutError(Exception):
    """A trial takes too long."""


def try_family(family: Family, seconds: int = 240, spec: str = SPEC) -> Trial:
    """All of it; exceptions become outcomes, but for mistakes in the catalogue itself."""
    model = family.build()
    found: list[ParallelProgram] = []
    plain = guarded(lambda: _compare(family, model, 1, found, spec), seconds)
    padding = None
    if family.padding:
        padding = guarded(lambda: _compare(family, model, 2, [], spec), seconds)
    if not found:
        return Trial(family.name, plain, padding)
    program = found[0].program
    attention, products = report.attention_of(program), products_of(program)
    return Trial(
        family.name,
        plain,
        padding,
        any_length=any_length(program),
        forms=_counted([a.form for a in attention]),
        masks=_counted([a.mask for a in attention]),
        gathers=len(report.gathers_of(program)),
        products=len(products),
        split=sum(bool(type_.layout.axes) for type_ in products),
    )


def _counted(names: list[str]) -> tuple[tuple[str, int], ...]:
    return tuple((name, names.count(name)) for name in dict.fromkeys(names))


def guarded(attempt: Any, seconds: int) -> Outcome:
    try:
        with _time_limit(seconds):
            return attempt()
    except RingCompileError as error:
        line = shortened(str(error.location)) if error.location else ""
        return Outcome(REFUSED, reason=shortened(error.message), line=line)
    except Exception as error:  # whatever it is, the table shows it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).strip() or "no message").splitlines()[0]
        return Outcome(
            CRASHED,
            reason=shortened(f"{type(error).__name__}: {text}"),
            line=shortened(f"{frame.filename}:{frame.lineno}"),
        )


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shortened(text: str) -> str:
    """Paths relative to the package they are in."""
    words = []
    for word in text.split(" "):
        for package in ("diffusers", "transformers", "torch", "sympy", "ringcompile", "tests"):
            if word.startswith("/") and f"/{package}/" in word:
                word = f"{package}/{word.rpartition(f'/{package}/')[2]}"
                break
        words.append(word)
    return " ".join(words)


def _compare(
    family: Family, model: nn.Module, batch: int, found: list[ParallelProgram], spec: str
) -> Outcome:
    inputs = _inputs(family, LENGTH, batch)
    program = capture(model, (), _inputs(family, CAPTURED, batch))
    if not any_length(program):
        program = capture(model, (), inputs)
    parallel = transform(program, spec)
    found.append(parallel)
    outputs = run(parallel, inputs).outputs
    return judged(family, outputs, reference(model, inputs), inputs)


def _inputs(family: Family, length: int, batch: int) -> dict[str, torch.Tensor]:
    inputs = family.example(length, batch)
    if batch == 1:
        return inputs
    hidden = slice(0, PADDED) if family.padding == "left" else slice(length - PADDED, length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1, hidden] = 0
    inputs["input_ids"][mask == 0] = 0
    return {**inputs, "attention_mask": mask}


def any_length(program: Program) -> bool:
    """Whether a program serves other lengths than that of its example."""
    varies = any(
        is_symbolic(size) and SEQUENCE in symbols_in(size)
        for given in program.inputs
        for size in given.type.shape
    )
    tokens = [given.type.shape for given in program.inputs if given.name == "input_ids"]
    return varies and all(is_symbolic(shape[1]) for shape in tokens)


@torch.no_grad()
def reference(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One device's outputs, with the attention that the model's own file spells out."""
    own = deepcopy(model)
    own.set_attn_implementation("eager")
    return {name: value for name, value in own(**inputs).items() if torch.is_tensor(value)}


def judged(
    family: Family,
    outputs: Mapping[str, Any],
    expected: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> Outcome:
    """Outputs against one device's, by name."""
    names = {name for name, value in outputs.items() if torch.is_tensor(value)}
    if names != set(expected):
        return Outcome(WRONG, reason=f"outputs are {sorted(names)}, not {sorted(expected)}")
    worst, reason = 0.0, ""
    for name, value in expected.items():
        found = outputs[name]
        if found.shape != value.shape or found.dtype != value.dtype:
            return Outcome(WRONG, reason=f"'{name}' has another shape or dtype")
        keep = _real(family, name, value, inputs)
        gap = scaled_difference(found[keep], value[keep])
        if not gap <= worst:
            worst, reason = gap, f"'{name}' differs"
    if worst <= TOLERANCE:
        return Outcome(MATCHED, worst)
    return Outcome(WRONG, worst, reason)


def scaled_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of max(1, largest expected value); NaN where one is NaN."""
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _real(
    family: Family, name: str, value: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> Any:
    """What selects the rows of real tokens, where an output has a row for each."""
    mask = inputs.get("attention_mask")
    if mask is None or value.shape[:2] != mask.shape:
        return ...
    if family.two_sequences and not name.startswith("encoder_"):
        return ...
    return mask.bool()
