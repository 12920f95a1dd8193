"""What `transform` returns: one program for all ranks, and each rank's own."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ringcompile import artifact
from ringcompile.axes import HALVES, TIME
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError, one_error
from ringcompile.ir.crosscheck import cross_check
from ringcompile.ir.origin import check_origin
from ringcompile.ir.plan import SplitPlan, plan_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.serialize import program_to_json
from ringcompile.ir.shortened import Shortened, shorten
from ringcompile.mesh import Mesh
from ringcompile.ops.ownership import check_ownership
from ringcompile.options import Options
from ringcompile.pass_list import rank_passes
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.canonicalize.canonicalize import Canonicalize
from ringcompile.passes.cleanup import CleanUp
from ringcompile.passes.rank.alike_rings import alike_attentions, outlined
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.passes.stages.split_pipeline import starts_of
from ringcompile.progress import counted

Observer = Callable[[Pass, Program, float], None]


@dataclass(repr=False)
class ParallelProgram:
    """A compiled model: the program that all ranks share, and the program of each rank.

    `rank(index)` returns a rank's program, which is made (or read from the artifact) at its first
    use. `save(folder)` writes an artifact.

    Attributes:
        program: what all ranks have in common; mesh coordinates are symbols in it.
        mesh: the parallel plan.
        options: how it was made; saved with it.
        check: whether each rank's program is checked behind every pass.
        schedule: the pass that orders each rank's program, if one does.
        saved: the artifact that it was read from, if it was.
        carried: the programs for the next tokens of a sequence, if there is a cache.
        prefill: beside those, the programs that divide a prompt over `ring`, if there are any.
    """

    program: Program
    mesh: Mesh
    options: dict[str, Any] = field(default_factory=dict)
    observe: Observer | None = None
    saved: artifact.Artifact | None = None
    check: bool = True
    schedule: Schedule | None = None
    carried: ParallelProgram | None = None
    prefill: ParallelProgram | None = None
    _ranks: dict[int, Program] = field(default_factory=dict)
    _short: dict[int, Program] = field(default_factory=dict)
    _verified: bool = False

    def __repr__(self) -> str:
        order = f", {self.program.sequence.order}" if self.program.sequence else ""
        return f"<ParallelProgram {self.program.name}: {self.mesh}{order}, {self.world_size} ranks>"

    def __str__(self) -> str:
        return "\n".join([repr(self)[1:-1], *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the model was compiled."""
        whole = self.program.notes
        later = () if self.carried is None else self.carried.program.notes
        return (*whole, *(f"with a cache: {note}" for note in later if note not in whole))

    @property
    def world_size(self) -> int:
        """The number of ranks, one process or GPU each."""
        return self.mesh.world_size

    @property
    def source(self) -> WeightSource | None:
        """Where the weights' data comes from."""
        return self.program.source

    def rank(self, rank: int) -> Program:
        """The program of one rank.

        Raises:
            RingCompileError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise RingCompileError(
                f"rank {rank} does not exist", hint=f"ranks are 0 to {self.world_size - 1}"
            )
        if rank not in self._ranks:
            read = self._lower if self.saved is None else self.saved.rank
            self._ranks[rank] = read(rank)
        return self._ranks[rank]

    def passes_of(self, rank: int) -> list[Pass]:
        """The passes that make a rank's program from the one for all ranks."""
        fuse = Options.recorded(self.options).fuse
        return rank_passes(rank, self.mesh, self.schedule, fuse=fuse)

    def _lower(self, rank: int) -> Program:
        """A rank's program; of blocks that are alike, few go through the passes."""
        if self._shortened is not None:
            short = self._passed(rank, self._shortened.program)
            stretched = self._shortened.stretched(short)
            if stretched is not None:
                self._short[rank] = short
                return stretched
        elif self._alike_rings:
            passes = self.passes_of(rank)
            found = outlined(self.program, self._alike_rings, passes, self.check)
            if found is not None:
                self._short[rank] = found.short
                return found.program
        return self._passed(rank, self.program)

    def _passed(self, rank: int, program: Program) -> Program:
        return Pipeline(self.passes_of(rank), self.observe, self.check).run(program)

    @cached_property
    def _shortened(self) -> Shortened | None:
        """The program with few of its alike blocks, where passes treat each block by itself."""
        if self.observe or self.schedule or self.mesh.size(TIME) > 1:
            return None
        return shorten(self.program)

    @cached_property
    def _alike_rings(self) -> dict[str, str]:
        """Ring attentions of which passes see the first alone, where each is written by itself."""
        if self.observe or self.schedule or self.mesh.size(TIME) * self.mesh.size(HALVES) > 1:
            return {}
        return alike_attentions(self.program)

    def ranks(self) -> list[Program]:
        """The programs of all ranks, in order."""
        return [self.rank(rank) for rank in counted("programs", range(self.world_size))]

    def verify(self) -> None:
        """Check all ranks' programs against each other; see `ir/crosscheck.py`.

        Programs of an artifact are also compared with what follows from the program for all ranks;
        see `ir/origin.py`. With a cache, each key is stored once and seen once by every later
        query; see `ops/ownership.py`.

        Raises:
            RingCompileError: naming the ranks and nodes that do not fit together.
        """
        with one_error("comparing the ranks", self.saved is not None):
            ranks = self.ranks()
            short = [self._short[rank] for rank in range(self.world_size) if rank in self._short]
            cross_check(short if len(short) == len(ranks) else ranks, self.mesh)
        if self.saved is not None and self.saved.made_here:
            for rank, program in enumerate(counted("programs compared", self.ranks())):
                check_origin(rank, program, self._derived(rank))
        for other in filter(None, (self.carried, self.prefill)):
            other.verify()
        if self.carried is not None:
            with one_error("proving that each key is kept once", self.saved is not None):
                check_ownership(
                    self.carried.program, self.carried.ranks(),
                    [] if self.prefill is None else self.prefill.ranks(), self.mesh,
                )

    def _derived(self, rank: int) -> Program:
        """What follows for a rank from a program for all ranks that may be anything."""
        with one_error(f"making rank {rank}'s program from the program for all ranks"):
            return self._lower(rank)

    def with_cache(self) -> ParallelProgram:
        """The programs for the next tokens of a sequence.

        Raises:
            RingCompileError: there are none.
        """
        if self.carried is None:
            raise RingCompileError(
                "the program was compiled without a cache",
                hint="pass cache=N to transform, or --cache N on the command line",
            )
        return self.carried

    def as_set(self) -> tuple[Program, list[Program]]:
        """The program for all ranks, and each rank's."""
        return self.program, self.ranks()

    def ensure_verified(self) -> None:
        """Check an artifact's ranks against each other, unless these programs passed that before.

        Raises:
            RingCompileError: as `verify`.
        """
        if self.saved is not None and not (self.saved.cross_checked or self._verified):
            self.verify()
            self._verified = True

    @property
    def identity(self) -> str:
        """A digest that is the same where two programs are: of an artifact, its manifest's."""
        if self.saved is not None:
            return self.saved.identity
        text = json.dumps(program_to_json(self.program), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def reference(self) -> Program | None:
        """The model for one device, in the few ops that artifacts hold; None where it is not known.

        It is as early as can be: no attention, mask or layout was read into it yet.

        Raises:
            RingCompileError: its file in the artifact is damaged.
        """
        if self.saved is not None:
            return self.saved.reference
        captured = self.program.captured
        return None if captured is None else Pipeline([Canonicalize(), CleanUp()]).run(captured)

    def plan(self) -> SplitPlan:
        """What splits each weight and why, and where stages begin; to edit and feed back."""
        with one_error("making a plan of the program", self.program.from_file):
            return self._plan()

    def _plan(self) -> SplitPlan:
        return plan_of(self.program, starts_of(self.program))

    def save(
        self, folder: str | Path, *, overwrite: bool = False, sign_with: Path | None = None
    ) -> None:
        """Write programs, weights and manifest to a folder, whole or not at all.

        Raises:
            RingCompileError: the ranks do not fit together, or the folder cannot be written.
        """
        self.verify()
        artifact.save(
            folder,
            spmd=self.program,
            ranks=self.ranks(),
            mesh=self.mesh,
            source=self.source,
            options=self.options,
            reference=self.reference,
            view=python_view,
            overwrite=overwrite,
            cross_checked=True,
            sign_with=sign_with,
            carried=None if self.carried is None else self.carried.as_set(),
            prefill=None if self.prefill is None else self.prefill.as_set(),
        )
