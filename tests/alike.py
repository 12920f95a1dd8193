"""Mutants that are alike on all ranks, which the ranks cannot tell by one another.

`python -m tests.alike [STEP]` changes the program for all ranks in one place, for every STEPth
kind of `tests.mutants` and on each of the four artifacts of `tests.test_mutants`, saves what
follows from it with digests that fit, and asks `verify --numerics`. A mutant that no pass lowers,
that cannot be read, or whose outputs are the model's own on many inputs does not count.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import ringcompile as rc
from ringcompile import artifact
from ringcompile.artifact.graph import program_from_json
from ringcompile.artifact.ops import allowed_ops
from ringcompile.ir.serialize import program_to_json
from tests.damage import differs, found
from tests.mutants import Mutant, kinds_of, mutant
from tests.test_mutants import ARTIFACTS, compiled

# Known to be missed: another fill of the rows that pad a share, where experts count rows. It shows
# only at lengths where the count crosses a capacity, of which `verify` tries few.
SAME, UNREAD = "the outputs are the same", "cannot be read or lowered"


@dataclass(frozen=True)
class Trial:
    """A mutant and what was said of it; nothing where it was missed.

    Attributes:
        name: of the artifact.
        kind: of the change.
        node: where.
        said: by `verify --numerics`.
        void: why it does not count, if it does not.
    """

    name: str
    kind: str
    node: str
    said: str
    void: str = ""


def trial(name: str, made: Mutant, folder: Path) -> Trial:
    """Change all ranks alike and verify."""
    right = compiled(name)
    try:
        program = program_from_json(made.data, allowed_ops())
        ranks = rc.ParallelProgram(program, right.mesh, right.options).ranks()
        artifact.save(
            folder, spmd=program, ranks=ranks, mesh=right.mesh, source=right.source,
            options=right.options, reference=right.reference, cross_checked=True,
        )
    except (rc.RingCompileError, AssertionError, TypeError, ValueError, LookupError) as error:
        return Trial(name, made.kind, made.node, str(error), UNREAD)
    said = found(folder)
    void = SAME if not said and not differs(right, rc.load(folder)) else ""
    return Trial(name, made.kind, made.node, said, void)


def trials(
    step: int = 1, start: int = 0, seed: int = 0, names: Iterable[str] = tuple(ARTIFACTS)
) -> Iterator[Trial]:
    """One mutant of every `step`th kind of each artifact that is named."""
    for name in names:
        data = program_to_json(compiled(name).program)
        for kind in kinds_of(data)[start::step]:
            made = mutant(data, kind, seed)
            if made is not None:
                with tempfile.TemporaryDirectory(prefix="alike-") as folder:
                    yield trial(name, made, Path(folder) / "out")


def summary(done: list[Trial]) -> str:
    """How many that count were found, each that was missed, and how many did not count."""
    real = [one for one in done if not one.void]
    missed = [one for one in real if not one.said]
    lines = [f"found {len(real) - len(missed)} of {len(real)}"]
    lines += [f"missed: {one.name}: {one.kind} at %{one.node}" for one in missed]
    lines += [f"{count} {void}" for void, count in Counter(t.void for t in done if t.void).items()]
    lines.append(f"{len({one.kind for one in real})} kinds")
    return "\n".join(lines)


def main() -> None:
    """Print what is said of each; see the module's docstring."""
    step, start = (int(text) for text in [*sys.argv[1:], "1", "0"][:2])
    torch.set_num_threads(1)
    done = []
    for one in trials(step, start):
        done.append(one)
        said = (one.void or one.said or "MISSED").splitlines()[0][:120]
        print(f"{one.name}: {one.kind} at %{one.node}: {said}", flush=True)
    print(summary(done))


if __name__ == "__main__":
    main()
