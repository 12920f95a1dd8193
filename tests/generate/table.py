"""What became of generating with each family, as a table in docs/generate.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.families.table import verdict
from tests.families.trial import CRASHED, REFUSED, WRONG
from tests.generate.trial import IDENTICAL, NEW, PROMPT, SPECS, UNMATCHED, Text, candidates
from tests.support import TOLERANCE

PAGE = Path(__file__).parents[2] / "docs" / "generate.md"
_TITLE = "## Families that generate\n"
_HEADER = ("family", *SPECS)
_WORST_FIRST = (CRASHED, WRONG, REFUSED, UNMATCHED, IDENTICAL)
_KINDS = {"identical": IDENTICAL, "**refused**": REFUSED, "**wrong**": WRONG,
          "**crashed**": CRASHED, "-": UNMATCHED}
_INTRODUCTION = """\
Small causal models of Hugging Face families, with random weights: a prompt of
{prompt} tokens and {new} new ones, each compared with the transformers model itself, run on
all tokens so far. *Identical*: the same tokens, and all logits of every step within
{tolerance:g} of max(1, the largest), in float32. {summary}
Made by `python -m tests.generate --write`; with names it writes their rows anew. A dash: the whole
sequence is refused already ([families.md](families.md) says why).
"""


def cell(text: Text, spec: str) -> str:
    """What the table says of a family and a spec."""
    outcome = text.outcomes[spec]
    if outcome.kind == UNMATCHED:
        return "-"
    return IDENTICAL if outcome.kind == IDENTICAL else verdict(outcome)


def row(text: Text) -> list[str]:
    """A row of the table; one reason for all specs is given once."""
    cells = [cell(text, spec) for spec in SPECS]
    return [text.family, *(
        "likewise" if i and entry == cells[0] and entry.startswith("**") else entry
        for i, entry in enumerate(cells)
    )]


def terminal(text: Text) -> str:
    """One line, with the differences."""
    parts = [f"{spec} {o.kind} {o.difference:.1e} {o.reason} {o.line}".rstrip()
             for spec, o in text.outcomes.items()]
    return " | ".join([f"{text.family:22}", *parts, f"ties {text.ties}"])


def rows_of(page: str) -> dict[str, list[str]]:
    """The rows of the table that a page has, by family."""
    lines = page.partition(_TITLE)[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {cells[0]: cells for cells in rows if len(cells) == len(_HEADER)
            and cells[0] not in (_HEADER[0], "---")}


def kind_of(cells: list[str]) -> str:
    """The worst that became of a family."""
    if cells[1] == "-":  # at ring=4, which is what counts as matched
        return UNMATCHED
    found = [_KINDS[entry.partition(":")[0]] for entry in cells[1:] if entry != "likewise"]
    return min(found, key=_WORST_FIRST.index)


def summary(rows: Mapping[str, list[str]]) -> str:
    """`Of 90 that are matched as a whole sequence: 85 identical, ...`."""
    kinds = Counter(kind_of(cells) for cells in rows.values())
    kinds.pop(UNMATCHED, None)
    figures = ", ".join(f"{kinds[kind]} {kind}" for kind in _WORST_FIRST[::-1] if kind != UNMATCHED)
    return f"Of {kinds.total()} that are matched as a whole sequence: {figures}."


def written(page: str, texts: Mapping[str, Text]) -> str:
    """The page with the rows of these families as they are now; the table stands at its end."""
    known = rows_of(page)
    made = {name: row(text) for name, text in texts.items()}
    rows = {name: made.get(name, known.get(name)) for name in candidates()}
    there = {name: cells for name, cells in rows.items() if cells is not None}
    lines = [_HEADER, ("---",) * len(_HEADER), *there.values()]
    intro = _INTRODUCTION.format(
        prompt=PROMPT, new=NEW, tolerance=TOLERANCE, summary=summary(there)
    )
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{page.partition(_TITLE)[0].rstrip()}\n\n{_TITLE}\n{intro}\n{table}"
