"""The trials of small modules as docs/own-modules.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from tests.own_modules.trial import AXES, CRASHED, LENGTHS, REFUSED, RIGHT, WRONG, Trial

PAGE = Path(__file__).parents[2] / "docs" / "own-modules.md"
_CHAPTERS = {
    "attention": "Attention in other words",
    "op": "Ops along and across the sequence",
}
_HEAD = f"""# Odd forms in your own module

Small modules in float64, one for each form; `python -m tests.own_modules --write` makes this page.
Each is captured at 24 tokens and two sequences, compiled for every plan in the table, and run at
{" and ".join(map(str, LENGTHS))} tokens, of which the second divides over no axis. *Right* means
that the largest difference from the module as PyTorch runs it is within 1e-10 of the largest
output. Ops stand behind a causal attention.

Scores that become no softmax, or that are used twice, are computed as the module writes them: each
rank computes its rows of all pairs of tokens, from keys that are gathered on every rank. A note of
the compiled program gives the line and the bytes, and `ringcompile check` lists what is gathered.
`scaled_dot_product_attention`, and the plain formula, gather nothing along `ring`.
"""


def page(trials: Sequence[Trial]) -> str:
    """The whole page."""
    parts = [_HEAD, summary(trials)]
    for kind, title in _CHAPTERS.items():
        rows = [trial for trial in trials if trial.item.startswith(f"{kind}: ")]
        lines = [
            f"| {item.removeprefix(f'{kind}: ')} | {verdict(list(group))} |"
            for item, group in groupby(rows, lambda trial: trial.item)
        ]
        parts.append("\n".join([f"## {title}\n", "| form | outcome |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def summary(trials: Iterable[Trial]) -> str:
    """How many forms are right on each plan."""
    counts = Counter((trial.spec, trial.outcome) for trial in trials)
    kinds = [RIGHT, REFUSED, WRONG, CRASHED]
    lines = [f"| plan | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    lines += [
        f"| `{spec}` | " + " | ".join(str(counts[spec, kind]) for kind in kinds) + " |"
        for spec in AXES
    ]
    return "\n".join([*lines, ""])


def verdict(trials: Sequence[Trial]) -> str:
    """What became of one form: `right`, or which plans are not and why."""
    reasons: dict[str, list[str]] = {}
    for trial in trials:
        if trial.outcome != RIGHT:
            reasons.setdefault(f"**{trial.outcome}**: {trial.text}", []).append(trial.spec)
    if not reasons:
        return RIGHT
    everywhere = len(trials)
    return "; ".join(
        text if len(specs) == everywhere else f"{', '.join(f'`{s}`' for s in specs)} {text}"
        for text, specs in reasons.items()
    )
