"""Families under products of axes: one capture each, all specs in lock-step, on record in a file.

    python -m tests.families.products [NAME ...] [--minutes N] [--write]

A run goes on where the last one stopped: outcomes are kept in a file of JSON, one line each, and
`--write` puts them into docs/families.md. `--again` tries names anew that are on record.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from tests.families import table
from tests.families.catalogue import CHAPTERS, FAMILIES
from tests.families.family import Family
from tests.families.sweep import quiet
from tests.families.trial import (
    CAPTURED,
    CRASHED,
    LENGTH,
    MATCHED,
    REFUSED,
    WRONG,
    Outcome,
    any_length,
    guarded,
    judged,
    reference,
)
from tests.support import run

SPECS = (
    "tp=2", "tp=4", "pp=2", "ulysses=2", "ep=2", "dp=2", "ring=2,tp=2", "ring=2,ulysses=2",
    "pp=2,ring=2,tp=2",
)
# Of all chapters: those that people use most, and one of each unusual kind.
NAMES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon", "falcon-alibi",
    "starcoder2", "olmo2", "cohere2", "granite", "glm4", "smollm3", "nemotron", "exaone4",
    "minicpm3", "doge", "xlnet", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2",
    "deepseek_v3", "gpt_oss", "phimoe", "jetmoe", "llama4", "dbrx", "bert", "roberta", "albert",
    "deberta_v2", "modernbert", "esm", "longformer", "vit", "dinov2", "swin", "siglip-vision",
    "segformer", "clip-text", "t5", "switch_transformers", "bart", "whisper", "prophetnet",
    "mamba", "jamba", "qwen3_next", "wav2vec2",
)
BATCH = 2
RECORD = Path(__file__).parents[2] / "build" / "families_products.jsonl"
_HEADER = ("family", *SPECS)

Record = dict[str, dict[str, Outcome]]


def try_specs(
    family: Family, specs: Sequence[str] = SPECS, seconds: int = 120
) -> Iterator[tuple[str, Outcome]]:
    """What becomes of a family under each spec; captured and canonicalized once."""
    model, found = family.build(), dict[str, Any]()
    inputs = family.example(LENGTH, BATCH)

    def captured() -> Outcome:
        program = capture(model, (), family.example(CAPTURED, BATCH))
        if not any_length(program):
            program = capture(model, (), inputs)
        found["program"] = prepare(program)
        found["expected"] = reference(model, inputs)
        return Outcome(MATCHED)

    first = guarded(captured, seconds)
    checked: dict[Any, Any] = {}
    for spec in specs:
        if first.kind != MATCHED:
            yield spec, first
            continue
        yield spec, guarded(
            lambda spec=spec: _compared(  # type: ignore[misc]
                family, model, found["program"], spec, inputs, found["expected"], checked
            ), seconds,
        )


def _compared(
    family: Family, model: nn.Module, program: Program, spec: str,
    inputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor],
    checked: dict[Any, Any],
) -> Outcome:
    parallel = transform(program, spec, checked=checked)
    late = guarded(lambda: judged(family, run(parallel, inputs).outputs, expected, inputs), 120)
    if late.kind == REFUSED:  # transform had accepted it
        return Outcome(CRASHED, reason=f"refused behind transform: {late.reason}", line=late.line)
    return late


def read_record(path: Path) -> Record:
    """What is on record; later lines go before earlier ones."""
    found: Record = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        name, spec = entry.pop("family"), entry.pop("spec")
        found.setdefault(name, {})[spec] = Outcome(**entry)
    return found


def missing(record: Record, names: Sequence[str]) -> list[str]:
    """The families that were not tried under each spec."""
    return [name for name in names if set(SPECS) - set(record.get(name, ()))]


def chapter(record: Record) -> str:
    """The chapter of docs/families.md."""
    names = [f.name for families in CHAPTERS.values() for f in families if f.name in record]
    notes: list[str] = []
    rows = [
        table.line([name, *(_cell(record[name].get(spec), notes) for spec in SPECS)])
        for name in names
    ]
    counts = Counter(o.kind for name in names for o in record[name].values())
    text = _INTRODUCTION.format(
        families=len(names), specs=len(SPECS), batch=BATCH, captured=CAPTURED, length=LENGTH,
        summary=table.summary_of(counts),
    )
    listed = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    head = [table.line(_HEADER), table.line(["---"] * len(_HEADER))]
    return "\n".join([table.PRODUCTS, text, *head, *rows, "", *listed]).rstrip("\n") + "\n"


def _cell(outcome: Outcome | None, notes: list[str]) -> str:
    """`matched`, or what it is instead with the number of its reason below the table."""
    if outcome is None:
        return "-"
    if outcome.kind == MATCHED:
        return MATCHED
    reason = table.verdict(outcome).partition(": ")[2]
    if reason not in notes:
        notes.append(reason)
    return f"**{outcome.kind}** ({notes.index(reason) + 1})"


def with_chapter(page: str, record: Record) -> str:
    """The page with this chapter in its place, behind those of families."""
    return table.with_chapter(page, table.PRODUCTS, chapter(record))


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(FAMILIES)), metavar="[NAME]...")
@click.option("--minutes", default=9.0, show_default=True, help="Begin no family after these.")
@click.option("--again", is_flag=True, help="Also families that are on record.")
@click.option("--write", is_flag=True, help="Write the chapter of docs/families.md.")
@click.option("--record", default=RECORD, type=click.Path(path_type=Path), help="The file.")
def main(
    names: tuple[str, ...], minutes: float, again: bool, write: bool, record: Path
) -> None:
    """Compile small models of many families under products of axes, and run all ranks."""
    quiet()
    wanted, end = names or NAMES, time.monotonic() + 60 * minutes
    record.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted if again else missing(read_record(record), wanted):
        if time.monotonic() > end:
            break
        begun = time.monotonic()
        for spec, outcome in try_specs(FAMILIES[name]):
            with record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"family": name, "spec": spec, **asdict(outcome)}) + "\n")
            click.echo(f"{name:20} {spec:20} {outcome.kind} {outcome.reason} {outcome.line}")
        click.echo(f"{name:20} {time.monotonic() - begun:.0f} s")
    found = read_record(record)
    click.echo(f"left: {', '.join(missing(found, wanted)) or 'none'}")
    if write:
        page = table.PAGE.read_text(encoding="utf-8")
        table.PAGE.write_text(with_chapter(page, found), encoding="utf-8")
    kinds = {outcome.kind for outcomes in found.values() for outcome in outcomes.values()}
    raise SystemExit(1 if kinds & {WRONG, CRASHED} else 0)


_INTRODUCTION = """\
{families} families under {specs} specs: {summary}. Made by
`python -m tests.families.products --write`, which goes on where it stopped. Each is captured once,
with {batch} sequences of {captured} tokens, and runs as above with {batch} of {length}. An error
behind `transform` counts as crashed. Reasons stand below the table.
"""


if __name__ == "__main__":
    main()
