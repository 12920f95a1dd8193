"""`python -m tests.generate [NAME ...] [--write]`: generate with families, token by token."""

from __future__ import annotations

import click

from tests.families.catalogue import FAMILIES
from tests.families.sweep import DIED, each
from tests.families.trial import CRASHED, WRONG
from tests.generate import table
from tests.generate.trial import SPECS, Text, candidates, try_generating


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(FAMILIES)), metavar="[NAME]...")
@click.option("--write", is_flag=True, help="Write the rows in docs/generate.md.")
@click.option("--missing", is_flag=True, help="Only families that have no row there yet.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--timeout", default=300, show_default=True, help="Seconds for each attempt.")
def main(names: tuple[str, ...], write: bool, missing: bool, jobs: int, timeout: int) -> None:
    """Generate tokens with small models of many families, and hold them against one device."""
    known = table.rows_of(table.PAGE.read_text(encoding="utf-8"))
    wanted = [n for n in names or candidates() if not (missing and n in known)]
    texts: dict[str, Text] = {}
    for text in each(wanted, jobs, timeout, try_generating, _died):
        texts[text.family] = text
        click.echo(table.terminal(text))
        if write:  # row by row: what is stopped goes on with --missing
            page = table.written(table.PAGE.read_text(encoding="utf-8"), {text.family: text})
            table.PAGE.write_text(page, encoding="utf-8")
    rows = {name: table.row(text) for name, text in texts.items()}
    click.echo(table.summary(rows))
    worst = {table.kind_of(cells) for cells in rows.values()}
    raise SystemExit(1 if {WRONG, CRASHED} & worst else 0)


def _died(name: str) -> Text:
    return Text(name, dict.fromkeys(SPECS, DIED))


if __name__ == "__main__":
    main()
