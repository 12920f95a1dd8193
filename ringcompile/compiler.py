"""The API behind the package's public names: capture, transform, check, save, load."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from ringcompile import artifact
from ringcompile.axes import TIME
from ringcompile.capture.dims import Dims
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import LoadedModel, load_model
from ringcompile.dump import report
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError, one_error
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.crosscheck import cross_check
from ringcompile.ir.expr import bind
from ringcompile.ir.origin import check_origin
from ringcompile.ir.plan import Plan, plan_of
from ringcompile.ir.printer import block_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.serialize import program_to_json
from ringcompile.mesh import Mesh
from ringcompile.options import DEFAULT, Given, Options
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.canonicalize import Canonicalize
from ringcompile.passes.carry import Carry, carried_mesh
from ringcompile.passes.cleanup import CleanUp
from ringcompile.passes.deal_batch import DealBatch
from ringcompile.passes.expert_parallel import ExpertParallel
from ringcompile.passes.fuse_merge import FuseMerge
from ringcompile.passes.halves import Halves
from ringcompile.passes.keep import Keep, caches_of, may_prefill
from ringcompile.passes.limit_ids import LimitIds
from ringcompile.passes.lower_ring import LowerRing
from ringcompile.passes.partition import Partition
from ringcompile.passes.place import Place
from ringcompile.passes.recognize_attention import RecognizeAttention
from ringcompile.passes.recognize_masks import RecognizeMasks
from ringcompile.passes.schedule import Schedule
from ringcompile.passes.specialize import Specialize
from ringcompile.passes.split_pipeline import SplitPipeline, TakeStage
from ringcompile.passes.tensor_parallel import TensorParallel
from ringcompile.passes.unfuse import Unfuse
from ringcompile.passes.unroll import Unroll

Observer = Callable[[Pass, Program, float], None]


def front_passes(
    mesh: Mesh,
    options: Options = DEFAULT,
    told: Mapping[str, int | None] | None = None,
    checked: dict[Any, Any] | None = None,
    *,
    carried: bool = False,
    prefill: bool = False,
) -> list[Pass]:
    """From a captured program to one program for all ranks.

    Args:
        mesh: the parallel plan.
        options: how to compile.
        told: for weights by name, the dim that `tp` splits, as the user's plan says.
        checked: as for `transform`.
        carried: write the program for the next tokens, with a cache of `options.cache` tokens.
        prefill: write the program that takes a prompt into that cache.
    """
    known = {} if checked is None else checked
    placed, carry = mesh, list[Pass]()
    if prefill:
        assert options.cache is not None
        carry = [Keep(mesh, options.cache), CleanUp()]
    if carried:
        assert options.cache is not None
        placed, carry = carried_mesh(mesh), [Carry(mesh, options.cache), CleanUp()]
        options = replace(options, order="auto", gather_unknown=False, tp_sequence=False)
    place = Place(
        placed, options.order, options.gather_unknown, options.capacity, options.ring,
        options.tp_sequence, known,
    )
    return [
        Canonicalize(),
        RecognizeAttention(),
        RecognizeMasks(),
        CleanUp(),
        LimitIds(),
        *([Unfuse()] if mesh.size("tp") > 1 else []),
        *([DealBatch(mesh, known), CleanUp()] if mesh.size("dp") * mesh.size("pp") > 1 else []),
        place,
        CleanUp(),
        *([ExpertParallel(mesh), CleanUp()] if mesh.size("ep") > 1 else []),
        *([TensorParallel(placed, told or {}), CleanUp()] if mesh.size("tp") > 1 else []),
        *carry,
        Partition(),
        CleanUp(),
        *([SplitPipeline(mesh, options.stages)] if mesh.size("pp") > 1 else []),
    ]


def rank_passes(rank: int, mesh: Mesh, schedule: Schedule | None = None) -> list[Pass]:
    """From the program for all ranks to that of one."""
    take = [TakeStage(mesh)] if mesh.size("pp") > 1 else []
    time = [Unroll()] if mesh.size(TIME) > 1 else []
    last = [schedule] if schedule is not None else []
    return [Specialize(rank), *take, *time, LowerRing(), FuseMerge(), *last]


@dataclass(repr=False)
class ParallelProgram:
    """One program for all ranks, and each rank's own, made (or read) when asked for.

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
        return self.program.notes

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

    def _lower(self, rank: int) -> Program:
        passes = rank_passes(rank, self.mesh, self.schedule)
        return Pipeline(passes, self.observe, self.check).run(self.program)

    def ranks(self) -> list[Program]:
        """The programs of all ranks, in order."""
        return [self.rank(rank) for rank in range(self.world_size)]

    def verify(self) -> None:
        """Check all ranks' programs against each other; see `ir/crosscheck.py`.

        Programs of an artifact are also compared with what follows from the program for all ranks;
        see `ir/origin.py`.

        Raises:
            RingCompileError: naming the ranks and nodes that do not fit together.
        """
        with one_error("comparing the ranks", self.saved is not None):
            cross_check(self.ranks(), self.mesh)
        if self.saved is not None and self.saved.made_here:
            for rank, program in enumerate(self.ranks()):
                check_origin(rank, program, self._derived(rank))
        for other in filter(None, (self.carried, self.prefill)):
            other.verify()

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

    def plan(self) -> Plan:
        """What splits each weight and why, and where stages begin; to edit and feed back."""
        with one_error("making a plan of the program", self.program.from_file):
            return self._plan()

    def _plan(self) -> Plan:
        firsts: dict[int, str] = {}
        for node in self.program.graph.nodes:
            if "stage" in node.meta and (layer := block_of(node)):
                firsts.setdefault(node.meta["stage"], layer)
        return plan_of(self.program, tuple(firsts[stage] for stage in sorted(firsts)[1:]))

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


def prepare(program: Program) -> Program:
    """Run what is the same for all parallel specs, once for many calls of `transform`.

    Raises:
        RingCompileError: with the user's line, for what cannot be compiled.
    """
    return Pipeline(front_passes(Mesh(()))[:_NUM_COMMON]).run(_with_origin(program))


def _with_origin(program: Program) -> Program:
    """The program, which keeps what was captured beside what passes make of it."""
    if Canonicalize.name in program.passes:
        return program
    return program.with_graph(program.graph, captured=program)


# The passes that come before any layout.
_NUM_COMMON = [step.name for step in front_passes(Mesh(()))].index(Place.name)


def in_halves(program: Program, capacity: str = "exact") -> Program:
    """A program that computes the halves of a batch apart, for schedules that overlap them.

    Args:
        program: from `capture`, for any batch.
        capacity: "local" where each half may count a capacity of experts alone.

    Raises:
        RingCompileError: at the op that mixes the sequences of a batch, or the batch is fixed.
    """
    made = Pipeline([Halves(capacity)]).run(prepare(program))
    return made.with_graph(made.graph, captured=program)


def transform(
    program: Program,
    parallel: str | Mesh,
    *,
    plan: Plan | None = None,
    record: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
    check: bool = True,
    checked: dict[Any, Any] | None = None,
    schedule: Schedule | None = None,
    passes: Sequence[Pass] = (),
    **options: Unpack[Given],
) -> ParallelProgram:
    """Compile a captured program for a mesh.

    Args:
        program: from `capture`, or from `prepare`.
        parallel: the parallel spec, such as "ring=4".
        plan: which weights are split, and where stages begin, as the user wants it; from
            `ir.plan.read_plan`.
        record: anything to keep with the artifact beside the options.
        observe: called behind every pass with the pass, the program and its seconds.
        check: whether programs are checked behind every pass.
        checked: what is known of the model's regions from earlier calls; added to.
        schedule: orders each rank's program, so that transfers overlap with more.
        passes: rewrites of your own, run on the model's program once attention and masks are
            recognized and before anything is divided.
        options: the fields of `Options`: `order`, `capacity`, `ring`, `tp_sequence`, `stages`,
            `length`, `gather_unknown`, `cache`.

    Raises:
        RingCompileError: with the user's line, for what cannot be compiled.
    """
    if not isinstance(program, Program):
        raise RingCompileError(
            f"transform takes a captured program, not {type(program).__name__}: capture it first",
            hint="rc.transform(rc.capture(model, (example_input,)), spec)",
        )
    mesh = Mesh.parse(parallel) if isinstance(parallel, str) else parallel
    chosen = with_plan(Options.of(options), plan)
    told = plan.told("tp") if plan else None
    front = front_passes(mesh, chosen, told, checked)
    front[_NUM_COMMON:_NUM_COMMON] = passes
    done = _NUM_COMMON if RecognizeMasks.name in program.passes else 0
    placed = Pipeline(front[done:], observe, check).run(_with_origin(program))
    placed = placed.with_graph(placed.graph, microbatches=chosen.microbatches)
    if chosen.length is not None:
        placed = placed.with_graph(placed.graph, lengths=_lengths(placed, chosen.length))
    kept = {"parallel": str(mesh), **Options.of(options).record(), **(record or {})}
    made = ParallelProgram(placed, mesh, kept, observe, check=check, schedule=schedule)
    if chosen.cache is not None:
        front = front_passes(mesh, chosen, told, checked, carried=True)
        front[_NUM_COMMON:_NUM_COMMON] = passes
        next_tokens = Pipeline(front[done:], observe, check).run(program)
        made.carried = ParallelProgram(next_tokens, mesh, kept, observe, check=check)
        if may_prefill(next_tokens):
            front = front_passes(mesh, chosen, told, checked, prefill=True)
            front[_NUM_COMMON:_NUM_COMMON] = passes
            prompt = Pipeline(front[done:], observe, check).run(_with_origin(program))
            if caches_of(prompt) == caches_of(next_tokens):
                made.prefill = ParallelProgram(prompt, mesh, kept, observe, check=check)
    return made


def with_plan(options: Options, plan: Plan | None) -> Options:
    """The options, with the stages of a plan where none are given."""
    stages = options.stages or (tuple(plan.stages) if plan else ())
    return replace(options, stages=stages)


def _lengths(program: Program, length: int) -> dict[str, int]:
    """The values of a program's length symbols for a sequence length that the user fixes."""
    assert program.sequence is not None
    whole = program.sequence.length
    if isinstance(whole, int) and whole != length:
        raise RingCompileError(
            f"sequence length {length}: the model's code fixes it at {whole}",
            hint="leave --seq out, or capture the model for another length",
        )
    return program.checked(program.sequence.bindings(length))


def load(folder: str | Path, *, verify_key: str | Path | None = None) -> ParallelProgram:
    """Read an artifact; each rank's graph and weights are read when they are asked for.

    Args:
        folder: where it lies.
        verify_key: a PEM file with the ed25519 public key of who has to have signed it.

    Raises:
        RingCompileError: the folder is not an artifact of this version, is damaged, or is not
            signed by that key.
    """
    return _loaded(artifact.load(folder, verify_key=verify_key))


def _loaded(found: artifact.Artifact) -> ParallelProgram:
    options = found.manifest.get("options", {})
    return ParallelProgram(
        found.spmd, found.mesh, options, saved=found,
        carried=None if found.carried is None else _loaded(found.carried),
        prefill=None if found.prefill is None else _loaded(found.prefill),
    )


def check(
    model: Program | nn.Module,
    parallel: str | Mesh,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dims: Dims | None = None,
    **options: Unpack[Given],
) -> report.Report:
    """Say, layer by layer, what would become of a model; never raises for what is refused.

    Args:
        model: a captured program, or a module with example inputs in `args` and `kwargs`.
        parallel: as for `transform`.
        args: as for `capture`; unused with a program.
        kwargs: likewise.
        dims: likewise.
        options: as for `transform`.
    """
    mesh = Mesh.parse(parallel) if isinstance(parallel, str) else parallel
    name = model.name if isinstance(model, Program) else type(model).__name__
    try:
        program = model if isinstance(model, Program) else capture(
            model, args, kwargs, dims=dims
        )
        made, refusals = _made(program, mesh, options)
        ranks = made.ranks()
    except RingCompileError as error:
        return report.Report(
            name, str(mesh), options.get("order", "auto"), False, refusals=(str(error),)
        )
    assert made.program.sequence is not None
    return report.Report(
        program.name,
        str(mesh),
        made.program.sequence.order,
        supported=not refusals,
        inputs=report.inputs_of(program),
        attention=report.attention_of(made.program),
        gathers=report.gathers_of(made.program),
        refusals=refusals,
        notes=made.program.notes,
        bytes_sent={rank: str(bind(bytes_sent(p), p.lengths)) for rank, p in enumerate(ranks)},
    )


def _made(
    program: Program, mesh: Mesh, options: Given
) -> tuple[ParallelProgram, tuple[str, ...]]:
    """The first refusal in full, and all others that gathering would get around."""
    try:
        return transform(program, mesh, **options), ()
    except RingCompileError as error:
        made = transform(program, mesh, **(options | {"gather_unknown": True}))
        return made, (str(error), *made.program.without_rule[1:])


def program_after(made: ParallelProgram, name: str, rank: int) -> Program:
    """The program as it was behind the named pass; early ones are made again from the model.

    Raises:
        RingCompileError: no such pass, or the model it was made from is not known.
    """
    late = rank_passes(rank, made.mesh, made.schedule)
    if name in [step.name for step in late]:
        return Pipeline(_up_to(late, name)).run(made.program)
    plan = made.plan()
    options = replace(Options.recorded(made.options), stages=tuple(plan.stages))
    front = front_passes(made.mesh, options, plan.told("tp"))
    if name not in [step.name for step in front]:
        known = [step.name for step in (*front, *late)]
        raise RingCompileError(
            f"unknown pass '{name}'", hint=f"passes: {', '.join(dict.fromkeys(known))}"
        )
    return Pipeline(_up_to(front, name)).run(recapture(made.options))


def recapture(options: Mapping[str, Any]) -> Program:
    """Capture the model an artifact was made from again, without its weights."""
    loaded = recorded_model(options, weights=False)
    said = {
        name: {int(dim): role for dim, role in roles.items()}
        for name, roles in (options.get("dims") or {}).items()
    }
    return capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name, dims=said)


def recorded_model(
    options: Mapping[str, Any], given: str | None = None, *, weights: bool = True
) -> LoadedModel:
    """The model that an artifact was made from.

    Args:
        options: of the artifact.
        given: what the user says it is; needed where it is code, which an artifact must not be able
            to make anyone run.
        weights: whether to load its weights.

    Raises:
        RingCompileError: the artifact names no model, or names code.
    """
    spec = given or options.get("model")
    if not spec:
        raise RingCompileError(
            "the artifact does not say which model it was made from",
            hint="name it: `ringcompile verify OUT --numerics --model MODEL`, or "
            "`ringcompile transform MODEL --passes ...` for early passes",
        )
    if given is None and ":" in spec:
        raise RingCompileError(
            f"the artifact was made from '{spec}', which is code that loading would run",
            hint=f"if you trust it: `ringcompile verify OUT --numerics --model {spec}`, or "
            f"`ringcompile transform {spec} --passes ...` for early passes",
        )
    return load_model(
        spec, batch=options.get("batch", 1), dtype=options.get("dtype"), weights=weights,
        extra=options.get("extra_inputs", ()),
    )


def _up_to(passes: list[Pass], name: str) -> list[Pass]:
    names = [step.name for step in passes]
    return passes[: len(names) - names[::-1].index(name)]
