"""Running and checking what was compiled: in this process, on local processes, under torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringcompile.compiler import recorded_model
from ringcompile.ir.communication import SHIFT
from ringcompile.numerics.check import Comparison, Numerics, Request
from ringcompile.numerics.draw import Draw, draw_inputs
from ringcompile.numerics.files import read_input_file
from ringcompile.numerics.roles import roles_of
from ringcompile.options import TRIES
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.data import name_inputs
from ringcompile.session import Session


@dataclass(frozen=True)
class Verification:
    """What was checked; ranks that do not fit together are an error instead."""

    ranks: int
    transfers: int
    numerics: tuple[Numerics, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.ranks} ranks fit together, {self.transfers} transfers"]
        lines += [
            f"length {row.length}: largest difference {row.difference:.2e} (allowed "
            f"{row.allowed:.0e})" for row in self.numerics
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    @property
    def passed(self) -> bool:
        """Whether every difference is within what is allowed; true if no numbers were compared."""
        return not self.wrong

    @property
    def wrong(self) -> str:
        """What differs, where, and how to see it again; empty where nothing does."""
        return next((row.wrong for row in self.numerics if row.wrong), "")


def run(
    parallel: ParallelProgram,
    inputs: Any,
    *,
    backend: str = "lockstep",
    last: int | None = None,
    outputs: str = "whole",
) -> Any:
    """Run a compiled model once. To run it many times, use a `Session`, which loads weights once.

    Args:
        parallel: what `transform` or `load` returned.
        inputs: the model's inputs: a mapping by name, a sequence in order, or one tensor.
        backend: as for `Session`.
        last: as for `Session.run`.
        outputs: likewise.

    Returns:
        what `Session.run` returns.

    Raises:
        RingCompileError: inputs that do not fit, or ranks that fail or do not join.
    """
    with Session(parallel, backend) as session:
        return session.run(inputs, last=last, outputs=outputs)


def verify(
    parallel: ParallelProgram,
    module: nn.Module | None = None,
    *,
    numerics: bool = False,
    model: str | None = None,
    seq: int | None = None,
    inputs: Any = None,
    tries: int = TRIES,
    seed: int = 0,
) -> Verification:
    """Check that the programs of all ranks fit together and, on request, compare outputs.

    If `parallel` was loaded from an artifact, all its files, weights included, are first compared
    with their digests. Outputs are compared on random inputs: ids from the whole vocabulary, masks
    with padding and holes, lengths that divide over the ranks and lengths that do not, and lengths
    around the thresholds in the model's code. They are compared with `module`, with the model that
    `model` names, or with the single-device program in the artifact. The last runs with its own
    weights and with larger ones, which make differences visible that small weights hide.

    Args:
        parallel: what `transform` or `load` returned.
        module: the model; with `numerics` and without it, the one that `model` or the program's
            own options name is loaded, if loading it runs no code that an artifact chose.
        numerics: compare numbers; any of the other arguments asks for it too.
        model: a spec, as for `load_model`.
        seq: compare at this sequence length only, in tokens.
        inputs: compare on these whole inputs only: by name, in order, or a file (see
            `read_input_file`).
        tries: random inputs for each length.
        seed: of the first random inputs.

    Raises:
        RingCompileError: files that were changed after they were saved, ranks that do not fit
            together, no model to compare with, or inputs that it does not take.
    """
    if parallel.saved is not None:
        parallel.saved.check()
    parallel.verify()
    programs = parallel.ranks()
    transfers = sum(str(n.target) == SHIFT for p in programs for n in p.graph.nodes)
    if not (numerics or module is not None or seq or inputs is not None):
        return Verification(len(programs), transfers)
    if module is None and (model or _names_a_model(parallel)):
        module = recorded_model(parallel.options, model).module
    comparison = Comparison(parallel, module)
    rows = tuple(comparison.run(_request(parallel, seq, inputs, tries, seed)))
    return Verification(len(programs), transfers, rows, tuple(comparison.notes))


def _names_a_model(parallel: ParallelProgram) -> bool:
    """Whether an artifact says what it was made from, and that is not code."""
    spec = parallel.options.get("model")
    return parallel.reference is None or bool(spec and ":" not in spec)


def _request(
    parallel: ParallelProgram, seq: int | None, inputs: Any, tries: int, seed: int
) -> Request:
    if inputs is None:
        return Request(length=seq, seed=seed, tries=tries)
    if isinstance(inputs, str | Path):
        named = name_inputs(parallel.program, read_input_file(Path(inputs)))
        return Request(inputs=named, named=f"the inputs of '{inputs}'")
    return Request(inputs=name_inputs(parallel.program, inputs))


def random_inputs(
    parallel: ParallelProgram, length: int, batch: int | None = None
) -> dict[str, torch.Tensor]:
    """Whole inputs by name, drawn as `verify --numerics` draws them, without padding; seeded.

    Ids come from all rows of the tables that they index, but for those that the model compares ids
    with, such as that of padding.

    Args:
        parallel: what is to take them.
        length: of the sequences, in tokens.
        batch: how many sequences; by default one for each replica.
    """
    program, mesh = parallel.program, parallel.mesh
    captured = parallel.reference or program
    least = max(mesh.size("dp"), program.batch_range[0])
    least += -least % program.batch_multiple
    return draw_inputs(
        captured, roles_of(captured), Draw(length, seed=0, plain=1), mesh.size("dp"),
        mesh.size("tp"), program, batch or least,
    )
