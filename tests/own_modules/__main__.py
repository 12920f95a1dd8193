"""`python -m tests.own_modules [WORD ...] [--write]`: try small modules, print what became of them.
"""

from __future__ import annotations

import click

from tests.own_modules.page import PAGE, page, summary, verdict
from tests.own_modules.trial import CRASHED, ITEMS, WRONG, Trial, trials


@click.command()
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--write", is_flag=True, help="Write docs/own-modules.md; needs all modules.")
def main(words: tuple[str, ...], write: bool) -> None:
    """Compile the modules whose names hold one of the words, or all, and compare."""
    if write and words:
        raise click.UsageError("--write is for all modules: leave the words out")
    found: list[Trial] = []
    for name in ITEMS:
        if not words or any(word in name for word in words):
            found += trials(name)
            click.echo(f"{name}: {verdict([trial for trial in found if trial.item == name])}")
    click.echo(summary(found))
    if write:
        PAGE.write_text(page(found), encoding="utf-8")
    raise SystemExit(1 if any(trial.outcome in (WRONG, CRASHED) for trial in found) else 0)


if __name__ == "__main__":
    main()
