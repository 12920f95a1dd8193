"""`python -m tests.families [NAME ...] [--write]`: try families, print what became of them.

The page is of `ring=4`; `--parallel tp=2` tries another spec, and only prints.
"""

from __future__ import annotations

import click

from tests.families import table
from tests.families.catalogue import FAMILIES
from tests.families.sweep import sweep
from tests.families.trial import CRASHED, SPEC, WRONG, Trial


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(FAMILIES)), metavar="[NAME]...")
@click.option("--parallel", "spec", default=SPEC, show_default=True)
@click.option("--write", is_flag=True, help="Write docs/families.md; with names, their rows.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--timeout", default=300, show_default=True, help="Seconds for each attempt.")
def main(names: tuple[str, ...], spec: str, write: bool, jobs: int, timeout: int) -> None:
    """Compile small models of many families for several ranks and compare with one device."""
    if write and spec != SPEC:
        raise click.UsageError(f"the page is of {SPEC}")
    trials: dict[str, Trial] = {}
    for trial in sweep(names or tuple(FAMILIES), jobs, timeout, spec):
        trials[trial.family] = trial
        click.echo(table.terminal(trial))
    click.echo(table.summary(trials))
    if write:
        known = table.PAGE.read_text(encoding="utf-8")
        _, begin, products = known.partition(table.PRODUCTS)
        text = table.updated(known, trials) if names else table.page(trials)
        if begin and not names:
            text += f"\n{begin}{products}"
        table.PAGE.write_text(text, encoding="utf-8")
    found = table.counts(trials)
    raise SystemExit(1 if found[WRONG] or found[CRASHED] else 0)


if __name__ == "__main__":
    main()
