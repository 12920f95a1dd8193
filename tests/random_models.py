"""Random whole models in plain PyTorch, each from a seed, and what becomes of them.

`python -m tests.random_models SEED...` (or `FIRST-LAST`) prints each case in words and its outcome;
`--wrong FILE` also appends every wrong or crashed one to a file at once.

Letters in shapes: B batch, S sequence, H heads, K KV heads, D head_dim, E hidden size.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.parallel_program import ParallelProgram
from tests.random_cases import (
    Case,
    case_of,
)
from tests.random_transformer import (
    RandomModel,
    inputs_of,
)
from tests.support import difference, run

TOLERANCE: Final = 1e-9  # in float64, of the largest output


@dataclass(frozen=True)
class Outcome:
    """`kind` is matched, refused, wrong or crashed."""

    kind: str
    detail: str


def trial(case: Case) -> Outcome:
    """Compile a case, run it at its lengths, and hold it against the model itself."""
    model = RandomModel(case)
    for length in case.lengths:
        _checked(model, inputs_of(case, length))
    try:
        parallel = compiled(model)
    except RingCompileError as error:
        return Outcome("refused", _first_lines(error))
    except Exception as error:
        return Outcome("crashed", f"while compiling: {_trace(error)}")
    worst = 0.0
    for length in lengths_of(parallel, case):
        try:
            error = distance(model, parallel, inputs_of(case, length))
        except Exception as failure:
            return Outcome("crashed", f"at length {length}: {_trace(failure)}")
        if not error <= TOLERANCE:
            return Outcome("wrong", f"at length {length}: off by {error:.3g} of the largest output")
        worst = max(worst, error)
    return Outcome("matched", f"within {worst:.1e}")


def lengths_of(parallel: ParallelProgram, case: Case) -> tuple[int, ...]:
    """The case's lengths that the program takes; the captured one if the model's code fixes it."""
    size = parallel.program.inputs[0].type.shape[1]
    if isinstance(size, int):
        return (size,)
    taken = tuple(n for n in case.lengths if n >= parallel.program.length_range[0])
    assert taken, "none of the lengths is tried"
    return taken


def compiled(model: RandomModel) -> ParallelProgram:
    """The parallel program of all ranks."""
    case = model.case
    example = inputs_of(case, case.capture_length)
    first = example.pop("inputs")
    parallel = transform(
        capture(model, (first,), example), case.parallel,
        order=case.order if "ring" in case.axes else "contiguous",
        length=case.lengths[0] if case.fixed else None, gather_unknown=case.gather_unknown)
    parallel.ranks()
    return parallel


@torch.no_grad()
def distance(model: RandomModel, parallel: ParallelProgram, inputs: dict[str, Tensor]) -> float:
    """The largest difference over the largest output; of real tokens where others see nothing."""
    found, expected = run(parallel, inputs).outputs, model(**inputs)
    if model.case.hides_rows:
        real = inputs["attention_mask"].bool()
        found, expected = (
            {name: value[real] if value.shape[:2] == real.shape else value
             for name, value in _named(outputs).items()}
            for outputs in (found, expected))
    return difference(found, expected)


def _named(outputs: Any) -> dict[str, Tensor]:
    return {"out": outputs} if torch.is_tensor(outputs) else dict(outputs)


@torch.no_grad()
def _checked(model: RandomModel, inputs: dict[str, Tensor]) -> None:
    outputs = _named(model(**inputs)).values()
    assert all(bool(x.isfinite().all()) for x in outputs), "the model itself gives NaN"


def _first_lines(error: RingCompileError) -> str:
    return " | ".join(str(error).splitlines()[:2])


def _trace(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} in {place}: {str(error)[:300]}"


def _seeds(texts: list[str]) -> Iterator[int]:
    for text in texts:
        first, _, last = text.partition("-")
        yield from range(int(first), int(last or first) + 1)


def main() -> None:
    """Try seeds; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Random models against the compiler")
    parser.add_argument("seeds", nargs="+", help="SEED or FIRST-LAST")
    parser.add_argument("--wrong", type=Path, help="append wrong and crashed cases to this file")
    parser.add_argument("--short", action="store_true", help="words only of wrong and crashed ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    for seed in _seeds(options.seeds):
        case = case_of(seed)
        outcome = trial(case)
        counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
        bad = outcome.kind in ("wrong", "crashed")
        lines = [f"{seed}: {outcome.kind}: {outcome.detail}"]
        lines += [f"    {case.words()}"] if bad or not options.short else []
        print("\n".join(lines), flush=True)
        if bad and options.wrong:
            with options.wrong.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
    print(counts)


if __name__ == "__main__":
    main()
