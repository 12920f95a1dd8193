"""`python -m tests.communication [--write]`: what each strategy sends, as a page."""

from __future__ import annotations

import click

from tests.communication.page import PAGE, page


@click.command()
@click.option("--write", is_flag=True, help="Write docs/communication.md instead of printing it.")
def main(write: bool) -> None:
    """The formulas of all strategies, and an example of each."""
    if write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        click.echo(page(), nl=False)


if __name__ == "__main__":
    main()
