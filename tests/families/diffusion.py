"""Diffusion transformers under several specs, and their chapter of docs/families.md.

    python -m tests.families.diffusion [NAME ...] [--write]

Each model is captured once; all ranks of each spec run in lock-step, in float64. `--write` puts
the outcomes into the page: of the families named, or of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import click
import torch

from ringcompile.capture.export import capture
from ringcompile.capture.flat_call import FlatCall
from ringcompile.compiler import transform
from ringcompile.dump import report
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from tests.families import table
from tests.families.denoisers import BY_NAME, Denoiser, Draw
from tests.families.sweep import each, quiet
from tests.families.trial import (
    CRASHED,
    MATCHED,
    WRONG,
    Outcome,
    any_length,
    guarded,
)
from tests.shares import products_of, with_share
from tests.support import difference, run

SPECS = ("ring=4", "ulysses=2", "ring=2,ulysses=2", "tp=2", "ring=2,tp=2", "dp=2,ring=2")
# Rows of tokens where a family takes any number: of the example, and of the run.
CAPTURED, ROWS = 4, 5
CHAPTER = "## Diffusion transformers\n"
_HEADER = ("family", "class", "attention", "positions", "text mask", "split", "gathers", *SPECS)


@dataclass(frozen=True)
class Trial:
    """What became of a family.

    Attributes:
        name: of the family.
        outcomes: by spec.
        products: matrix products and convolutions, of the program for ring=4.
        split: how many of them each rank computes for its share only.
        gathers: how many tensors are gathered whole, in the same program.
        any_length: whether the program serves other numbers of tokens.
    """

    name: str
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    products: int = 0
    split: int = 0
    gathers: int = 0
    any_length: bool = False


def try_denoiser(
    denoiser: Denoiser, specs: Sequence[str] = SPECS, seconds: int = 300
) -> Trial:
    """Capture a family once, and compile, run and compare it under each spec."""
    found, counts = dict[str, Any](), dict[str, int]()

    def captured() -> Outcome:
        model = denoiser.build()
        program = capture(model, (), denoiser.inputs(Draw(rows=CAPTURED)), dims=denoiser.dims)
        free = any_length(program)
        inputs = denoiser.inputs(Draw(rows=ROWS if free else CAPTURED))
        with torch.no_grad():
            found["expected"] = model(**inputs)
        found.update(
            program=prepare(program), inputs=FlatCall(model, (), inputs).example, free=free
        )
        return Outcome(MATCHED)

    def compared(spec: str) -> Outcome:
        parallel = transform(found["program"], spec)
        if spec == SPECS[0]:
            counts.update(_counted(parallel.program))
        gap = difference(run(parallel, found["inputs"]).outputs, found["expected"])
        close = gap <= denoiser.tolerance
        return Outcome(MATCHED, gap) if close else Outcome(WRONG, gap, "it differs")

    first = guarded(captured, seconds)
    outcomes = {
        spec: first if first.kind != MATCHED
        else guarded(lambda spec=spec: compared(spec), seconds)  # type: ignore[misc]
        for spec in specs
    }
    return Trial(denoiser.name, outcomes, any_length=found.get("free", False), **counts)


def _counted(program: Program) -> dict[str, int]:
    products = products_of(program)
    return {"products": len(products), "split": sum(map(with_share, products)),
            "gathers": len(report.gathers_of(program))}


def masks_matter(denoiser: Denoiser) -> bool:
    """Whether outputs change where the text mask, or else the text, does."""
    model, inputs = denoiser.build(), denoiser.inputs(Draw())
    text = denoiser.masks or next(
        name for name in ("encoder_hidden_states", "class_labels") if name in inputs
    )
    other = dict(inputs)
    other[text] = torch.ones_like(inputs[text]) if denoiser.masks else inputs[text].flip(0)
    with torch.no_grad():
        return difference(model(**other), model(**inputs)) > 1e-4


def cells(trial: Trial, notes: list[str]) -> list[str]:
    """A row of the table; reasons are added to the notes below it."""
    denoiser, compiled = BY_NAME[trial.name], trial.products > 0
    outcomes = [_cell(trial.outcomes[spec], notes) for spec in SPECS]
    return [
        trial.name, f"`{denoiser.model}`", denoiser.attention, denoiser.positions,
        "yes" if denoiser.masks else "-",
        f"{trial.split} of {trial.products}" if compiled else "-",
        str(trial.gathers) if compiled else "-", *outcomes,
    ]


def _cell(outcome: Outcome, notes: list[str]) -> str:
    if outcome.kind == MATCHED:
        return MATCHED
    reason = table.verdict(outcome).partition(": ")[2]
    if reason not in notes:
        notes.append(reason)
    return f"**{outcome.kind}** ({notes.index(reason) + 1})"


def chapter(trials: Sequence[Trial]) -> str:
    """The chapter of docs/families.md."""
    notes: list[str] = []
    rows = [table.line(cells(trial, notes)) for trial in trials]
    matched = sum(
        all(outcome.kind == MATCHED for outcome in trial.outcomes.values()) for trial in trials
    )
    kinds = Counter(o.kind for trial in trials for o in trial.outcomes.values())
    text = _INTRODUCTION.format(
        families=len(trials), matched=matched, specs=len(SPECS),
        summary=table.summary_of(kinds), tolerance=Denoiser.tolerance, version=version("diffusers"),
        any_length=", ".join(trial.name for trial in trials if trial.any_length),
    )
    listed = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    head = [table.line(_HEADER), table.line(["---"] * len(_HEADER))]
    return "\n".join([CHAPTER, text, *head, *rows, "", *listed]).rstrip("\n") + "\n"


def rows(page: str) -> list[str]:
    """The rows of this chapter, without its header."""
    own = page.partition(CHAPTER)[2].partition("\n## ")[0]
    return [line for line in own.splitlines()
            if line.startswith("| ") and not line.startswith(("| family", "| ---"))]


def sweep(names: Sequence[str], jobs: int = 2, seconds: int = 300) -> Iterator[Trial]:
    """The trials of these families, each in a process of its own."""
    died = Outcome(CRASHED, reason="the process died")
    return each(
        names, jobs, seconds, _trial, lambda name: Trial(name, dict.fromkeys(SPECS, died))
    )


def _trial(name: str, seconds: int) -> Trial:
    return try_denoiser(BY_NAME[name], seconds=seconds)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(BY_NAME)), metavar="[NAME]...")
@click.option("--write", is_flag=True, help="Write the chapter of docs/families.md; all families.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--timeout", default=300, show_default=True, help="Seconds for each attempt.")
def main(names: tuple[str, ...], write: bool, jobs: int, timeout: int) -> None:
    """Compile small diffusion transformers under several specs and compare with one device."""
    if names and write:
        raise click.UsageError("--write tries all families")
    quiet()
    trials = []
    for trial in sweep(names or tuple(BY_NAME), jobs, timeout):
        trials.append(trial)
        for spec, outcome in trial.outcomes.items():
            click.echo(f"{trial.name:14} {spec:18} {outcome.kind} {outcome.difference:.1e} "
                       f"{outcome.reason} {outcome.line}")
        click.echo(f"{trial.name:14} split {trial.split} of {trial.products}")
    if write:
        page = table.PAGE.read_text(encoding="utf-8")
        table.PAGE.write_text(table.with_chapter(page, CHAPTER, chapter(trials)), encoding="utf-8")
    kinds = {outcome.kind for trial in trials for outcome in trial.outcomes.values()}
    raise SystemExit(1 if kinds & {WRONG, CRASHED} else 0)


_INTRODUCTION = """\
{families} models of diffusers under {specs} specs, {matched} matched under all of them: {summary}.
Made by `python -m tests.families.diffusion --write` with diffusers {version}. Each is a small one
with random weights and two sequences, captured once. All ranks run in float64 and are *matched*
if no value is off by more than {tolerance:g} of the largest one (2e-5 where a model's own code
computes in float32, as the linear attention of sana does). *Text mask* says whether the
second sequence's text is padded and hidden by a mask. Image tokens are split; text tokens are too
where both are one sequence (the blocks with a single stream), and are replicated where they have
weights of their own. *Split* counts the products of the program for `{first}` of which each rank
computes its share, windows included: text, modulation by the time step and what comes before the
first attention over both are computed on every rank. *Gathers* are those of that program, such as
the result; a joint attention's rows of text are summed over ranks that each add their own. Programs
for any number of image tokens run at another one than that of the example ({any_length}); elsewhere
the model's code fixes it. Reasons stand below the table.
""".replace("{first}", SPECS[0])

if __name__ == "__main__":
    main()
