"""The trials' table, on the terminal and as docs/families.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from tests.families.catalogue import CHAPTERS, FAMILIES
from tests.families.trial import (
    CAPTURED,
    LENGTH,
    MATCHED,
    PADDED,
    SPEC,
    Outcome,
    Trial,
)
from tests.support import TOLERANCE

# Where the chapter begins that products.py writes: this module's are all in front of it.
PRODUCTS = "## Under products of axes\n"
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_HEADER = ("family", "class", "attention", "positions", "masks found", "split", "gathers",
           "outcome", "padded batch")
_WORST_FIRST = ("crashed", "wrong", "refused", MATCHED)
_SUMMARY = re.compile(r"tried \d+: [\w ,]+ crashed")
_SIZES = re.compile(r"\[[^\]]*\]")


def verdict(outcome: Outcome | None) -> str:
    """What the table says of an outcome, without figures that rounding could change."""
    if outcome is None:
        return "-"
    if outcome.kind == MATCHED:
        return MATCHED
    where = f" (`{outcome.line}`)" if outcome.line else ""
    # The first sentence: torch's messages go on for paragraphs, with names that vary.
    return f"**{outcome.kind}**: {outcome.reason.partition('. ')[0]}{where}"


def cells(trial: Trial) -> dict[str, str]:
    """A row of the table, by column."""
    family = FAMILIES[trial.family]
    same = trial.padding is not None and verdict(trial.padding) == verdict(trial.plain) != MATCHED
    outcome = verdict(trial.plain)
    if trial.plain.kind == MATCHED and not trial.any_length:
        outcome += ", at this length only"
    compiled = trial.products > 0
    row = (
        family.name,
        f"`{family.model}`",
        family.attention,
        family.positions,
        _masks(trial.masks),
        f"{trial.split} of {trial.products}" if compiled else "-",
        str(trial.gathers) if compiled else "-",
        outcome,
        "likewise" if same else verdict(trial.padding),
    )
    return dict(zip(_HEADER, row, strict=True))


def _masks(masks: Sequence[tuple[str, int]]) -> str:
    counts: Counter[str] = Counter()
    for name, count in masks:
        counts[_SIZES.sub("", re.sub(r"mask \w+\[", "a tensor[", name))] += count
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "-"


def terminal(trial: Trial) -> str:
    """One line, with the differences."""
    row = cells(trial)
    parts = [f"{row['family']:22} {_figure(trial.plain)}", f"padded {_figure(trial.padding)}",
             f"masks {row['masks found']}", f"split {row['split']}",
             f"gathers {row['gathers']}"]
    reasons = {o.reason + (f" ({o.line})" if o.line else "")
               for o in (trial.plain, trial.padding) if o and o.reason}
    return " | ".join([*parts, *sorted(reasons)])


def _figure(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    return f"{outcome.kind} {outcome.difference:.1e}" if outcome.difference else outcome.kind


def counts(trials: Mapping[str, Trial]) -> Counter[str]:
    """How many families had which outcome; the worse one of a family's two."""
    return Counter(
        min((o.kind for o in (t.plain, t.padding) if o), key=_WORST_FIRST.index)
        for t in trials.values()
    )


def page(trials: Mapping[str, Trial]) -> str:
    """docs/families.md, as far as this module writes it."""
    introduction = _INTRODUCTION.format(
        torch=torch.__version__.partition("+")[0], transformers=transformers.__version__,
        spec=SPEC, captured=CAPTURED, length=LENGTH, padded=PADDED, tolerance=TOLERANCE,
        summary=summary(trials),
    )
    return _with_chapters(introduction, _rows(trials))


def updated(text: str, trials: Mapping[str, Trial]) -> str:
    """docs/families.md with the rows of these families as they are now."""
    text, begin, rest = text.partition(PRODUCTS)
    introduction, _, tables = text.partition(f"## {next(iter(CHAPTERS))}\n")
    known = (row for row in tables.splitlines() if len(row.split(" | ")) >= len(_HEADER))
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in known} | _rows(trials)
    worst: Counter[str] = Counter()
    for name in FAMILIES.keys() & rows.keys():
        outcomes = " | ".join(rows[name].split(" | ")[len(_HEADER) - 2 :])
        kinds = (kind for kind in _WORST_FIRST[:-1] if f"**{kind}**" in outcomes)
        worst[next(kinds, MATCHED)] += 1
    introduction = _SUMMARY.sub(summary_of(worst), introduction, count=1)
    made = _with_chapters(introduction, rows)
    return f"{made}\n{begin}{rest}" if begin else made


def _rows(trials: Mapping[str, Trial]) -> dict[str, str]:
    return {name: line(list(cells(trial).values())) for name, trial in trials.items()}


def _with_chapters(introduction: str, rows: Mapping[str, str]) -> str:
    """The text with a table for each chapter, of the families that there is a row for."""
    text = [introduction.rstrip("\n") + "\n"]
    for title, families in CHAPTERS.items():
        text += [f"## {title}\n", line(_HEADER), line(["---"] * len(_HEADER)),
                 *(rows[family.name] for family in families if family.name in rows), ""]
    return "\n".join(text).rstrip("\n") + "\n"


def with_chapter(page: str, title: str, chapter: str) -> str:
    """The page with a chapter of another module in its place, or at the end; others stay."""
    before, _, own = page.partition(title)
    _, behind, others = own.partition("\n## ")
    return before.rstrip("\n") + "\n\n" + chapter + behind + others


def summary(trials: Mapping[str, Trial]) -> str:
    """`tried 120: 110 matched, 10 refused, 0 wrong, 0 crashed`."""
    return summary_of(counts(trials))


def summary_of(found: Counter[str]) -> str:
    """Outcomes by kind, in words."""
    kinds = (MATCHED, "refused", "wrong", "crashed")
    return f"tried {found.total()}: " + ", ".join(f"{found[kind]} {kind}" for kind in kinds)


def line(entries: Sequence[str]) -> str:
    """A row in Markdown."""
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"


_INTRODUCTION = """\
# Families of models

What becomes of models of Hugging Face transformers, each a small one of its family: {summary}.
Made by `python -m tests.families --write` with torch {torch} and transformers {transformers};
`make test-all` holds this page against what the code does.

Weights are random, drawn so that masks, windows, positions, soft caps and sinks change the outputs.
A model is captured at length {captured} and compiled with `--parallel {spec}`; all ranks run at
length {length}, which does not divide over them, and every output is compared with one device's. It
is *matched* if no value is off by more than {tolerance:g} of max(1, the largest value of that
output), in float32. *Refused* is an error that names the reason and the model's line; *wrong* are
outputs that differ. A padded batch has two sequences, {padded} tokens of one are padding, and the
real tokens' outputs are compared. Models that only work at the length of the example (images of one
size, for instance) are captured at the length at which they run: "at this length only". *Split*
counts the matrix products and convolutions, beside attention itself, of which each rank computes
its share; the others are computed whole on every rank, as what comes before the first attention of
a model with recurrence is. *Gathers* counts tensors that are gathered whole, such as the first
token's state for a pooler. A decoder beside an encoder has about half as many tokens as that.
"""
