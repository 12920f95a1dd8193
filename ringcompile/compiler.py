"""The API behind the package's public names: capture, transform, check, save, load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ringcompile import artifact
from ringcompile.decode_choice import faster_form
from ringcompile.dump import report
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import SEQUENCE, bind
from ringcompile.ir.plan import SplitPlan
from ringcompile.ir.program import Program
from ringcompile.later import Later
from ringcompile.mesh import Mesh
from ringcompile.options import Given, Options
from ringcompile.parallel_program import Observer, ParallelProgram
from ringcompile.pass_list import NUM_COMMON, front_passes, with_origin
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.carry.decode_features import check_helix, kept_along, may_be_helix
from ringcompile.passes.carry.keep import caches_of, may_prefill
from ringcompile.passes.masks.recognize_masks import RecognizeMasks
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.passes.stages.split_pipeline import starts_of
from ringcompile.passes.user_pass import UserPass
from ringcompile.runtime.device_mesh import mesh_of

if TYPE_CHECKING:  # torch.export, which most commands on an artifact do not need
    from ringcompile.capture import export, loaders
    from ringcompile.capture.dims import Dims
else:
    export = Later("ringcompile.capture.export")
    loaders = Later("ringcompile.capture.loaders")


def transform(
    program: Program,
    parallel: str | Mesh | DeviceMesh,
    *,
    plan: SplitPlan | None = None,
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
        parallel: the parallel spec, such as "ring=4", or a torch `DeviceMesh` whose dims are named
            by axes.
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
            `microbatches`, `length`, `gather_unknown`, `cache`, `decode`, `fuse`.

    Raises:
        RingCompileError: with the user's line, for what cannot be compiled.
    """
    _check_captured(program)
    mesh = mesh_of(parallel)
    chosen = with_plan(Options.of(options), plan)
    told = plan.told("tp") if plan else None
    done = NUM_COMMON if RecognizeMasks.name in program.passes else 0

    def compiled(options: Options, **which: bool) -> Program:
        front = front_passes(mesh, options, told, checked, **which)
        front[NUM_COMMON:NUM_COMMON] = map(UserPass, passes)
        return Pipeline(front[done:], observe, check).run(with_origin(program))

    placed = _as_chosen(compiled(chosen), chosen)
    kept = {"parallel": str(mesh), **Options.of(options).record(), **(record or {})}
    made = ParallelProgram(placed, mesh, kept, observe, check=check, schedule=schedule)
    if chosen.cache is not None:
        def decoding(form: str) -> ParallelProgram:
            program = compiled(replace(chosen, decode=form), carried=True)
            return ParallelProgram(program, mesh, {**kept, "decode": form}, observe, check=check)

        made.carried = _decoding(mesh, chosen.decode, decoding)
        made.options["decode"] = made.carried.options["decode"]
        prompt = _prompt(made.carried.program, chosen, compiled)
        if prompt is not None:
            made.prefill = ParallelProgram(prompt, mesh, kept, observe, check=check)
    return made


def _as_chosen(program: Program, options: Options) -> Program:
    """The program with its number of microbatches, for the one length if there is one."""
    program = program.with_graph(program.graph, microbatches=options.microbatches)
    if options.length is None:
        return program
    return program.with_graph(program.graph, lengths=_lengths(program, options.length))


def _check_captured(program: object) -> None:
    if not isinstance(program, Program):
        raise RingCompileError(
            f"transform takes a captured program, not {type(program).__name__}: capture it first",
            hint="rc.transform(rc.capture(model, (example_input,)), spec)",
        )


def _decoding(
    mesh: Mesh, form: str, decoding: Callable[[str], ParallelProgram]
) -> ParallelProgram:
    """The programs for the next tokens, in the form that is asked for or the faster one."""
    if form == "helix":
        check_helix(mesh)
    if kept_along(mesh) == 1 or (form == "auto" and not may_be_helix(mesh)):
        return decoding("simple")
    if form != "auto":
        return decoding(form)
    return faster_form(decoding("simple"), lambda: decoding("helix"))


def _prompt(
    next_tokens: Program, options: Options, compiled: Callable[..., Program]
) -> Program | None:
    """The program that divides a prompt over `ring`; None where there is none.

    It saves work only. Its stages have to keep the same layers' keys as those of the other program,
    and a model may have no layer to cut both at.
    """
    if not may_prefill(next_tokens):
        return None
    try:
        prompt = compiled(replace(options, stages=starts_of(next_tokens)), prefill=True)
    except RingCompileError:
        return None
    return prompt if caches_of(prompt) == caches_of(next_tokens) else None


def with_plan(options: Options, plan: SplitPlan | None) -> Options:
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
    return program.checked({SEQUENCE: length})


def load(folder: str | Path, *, verify_key: str | Path | None = None) -> ParallelProgram:
    """Read an artifact. The graph and the weights of a rank are read at their first use.

    Args:
        folder: the artifact's folder.
        verify_key: a PEM file with an ed25519 public key; the artifact must be signed with its
            private key.

    Raises:
        RingCompileError: the folder is not an artifact of this version, is damaged, or has no
            signature that fits the key.
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
    parallel: str | Mesh | DeviceMesh,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dims: Dims | None = None,
    **options: Unpack[Given],
) -> report.Report:
    """Report how a model would be parallelized, layer by layer, and why if it would be refused.

    Args:
        model: a captured program, or a module with example inputs in `args` and `kwargs`.
        parallel: as for `transform`.
        args: as for `capture`; unused with a program.
        kwargs: likewise.
        dims: likewise.
        options: as for `transform`.
    """
    mesh = mesh_of(parallel)
    name = model.name if isinstance(model, Program) else type(model).__name__
    try:
        program = model if isinstance(model, Program) else export.capture(
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
    late = made.passes_of(rank)
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
    return export.capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name, dims=said)


def recorded_model(
    options: Mapping[str, Any], given: str | None = None, *, weights: bool = True
) -> loaders.LoadedModel:
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
    return loaders.load_model(
        spec, batch=options.get("batch", 1), dtype=options.get("dtype"), weights=weights,
        extra=options.get("extra_inputs", ()),
    )


def _up_to(passes: list[Pass], name: str) -> list[Pass]:
    names = [step.name for step in passes]
    return passes[: len(names) - names[::-1].index(name)]
