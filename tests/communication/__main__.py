"""`python -m tests.communication [--write | --many]`: what each strategy sends, as a page."""

from __future__ import annotations

import click

from tests.communication.many import MANY, found
from tests.communication.page import PAGE, page


@click.command()
@click.option("--write", is_flag=True, help="Write docs/communication.md instead of printing it.")
@click.option("--many", is_flag=True, help="Print what many ranks send, from their programs.")
def main(write: bool, many: bool) -> None:
    """The formulas of all strategies, and an example of each."""
    if many:
        for row in MANY:
            click.echo(f"{row.model}: {row.ring} {found(row)[0]:,}, {row.tiles} {found(row)[1]:,}")
    elif write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        click.echo(page(), nl=False)


if __name__ == "__main__":
    main()
