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
# A loss of the whole batch, for instance: no replica has it alone.
_MIXES = "mixes the sequences of a batch"
_HEAD = f"""# Odd forms in your own module

Small modules in float64, one for each form; `python -m tests.own_modules --write` makes this page.
Each is captured at 24 tokens and two sequences, compiled for every plan in the table, and run at
{" and ".join(map(str, LENGTHS))} tokens, of which the second is divisible by no axis. *Right* means
that the largest difference from the module as PyTorch runs it is within 1e-10 of the largest
output. Each op follows a causal attention. The *share right* of `dp=2` leaves out forms that mix
the sequences of a batch, such as a loss, since no replica has all of them.

Attention scores without a softmax, or used twice, are computed as the module writes them: each
rank computes its rows of all pairs of tokens, from keys that are gathered on every rank. A note of
the compiled program gives the line and the bytes, and `ringcompile check` lists what is gathered.
`scaled_dot_product_attention`, and softmax(q k^T) v written out, gather nothing along `ring`.
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
    """How many forms are right on each plan; and of how many, less those no replica can have."""
    counts: Counter[tuple[str, str]] = Counter()
    for trial in trials:
        counts[trial.spec, trial.outcome] += 1
        counts[trial.spec, _MIXES] += _MIXES in trial.text
    kinds = [RIGHT, REFUSED, WRONG, CRASHED]
    lines = [f"| plan | {' | '.join(kinds)} | share right |", "|---|" + "---|" * (len(kinds) + 1)]
    for spec in AXES:
        tried = sum(counts[spec, kind] for kind in kinds) - counts[spec, _MIXES]
        share = counts[spec, RIGHT] / max(tried, 1)
        numbers = " | ".join(str(counts[spec, kind]) for kind in kinds)
        lines.append(f"| `{spec}` | {numbers} | {share:.0%} |")
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
