"""`ringcompile check`: what would become of a model, layer by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ringcompile.commands.options import (
    JSON,
    MODEL,
    PARALLEL,
    ModelArgument,
    compile_options,
    model_options,
    print_table,
    working,
)
from ringcompile.garbage import few_collections
from ringcompile.later import Later
from ringcompile.mesh import Mesh
from ringcompile.options import Options

if TYPE_CHECKING:
    from ringcompile import compiler
    from ringcompile.dump.report import Report
else:
    compiler = Later("ringcompile.compiler")


# The symbols that amounts of bytes may have.
_MEANINGS = {
    "b": "sequences of the batch",
    "k": "sequences of a microbatch",
    "n": "tokens on one rank, padding included",
    "s": "tokens of a sequence",
}


@click.command()
@MODEL
@PARALLEL
@compile_options
@model_options
@JSON
@few_collections()
def check(
    model: ModelArgument,
    parallel: str,
    as_json: bool,
    options: Options,
) -> None:
    """Report how MODEL would be parallelized, layer by layer.

    Weights are not read. The exit code is 1 if the model cannot be compiled.
    """
    mesh = Mesh.parse(parallel)
    with working(f"checking {model.name}"):
        loaded = model.load(options.length, weights=":" in model.name)
        found = compiler.check(
            loaded.module, mesh, loaded.args, loaded.kwargs, dims=model.dims, **options.given()
        )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print_report(found)
    if not found.supported:
        raise click.exceptions.Exit(1)


def _print_report(found: Report) -> None:
    title = f"{found.model} with {found.mesh}, order {found.order}"
    rows = [
        [names, line, form, mask] for names, (line, form, mask) in _alike(
            [(row.layer, (row.line, row.form, row.mask)) for row in found.attention]
        )
    ]
    if rows:
        print_table(title, ["layer", "line", "attention", "mask"], rows)
    else:
        click.echo(title)
    for text in found.inputs:
        click.echo(f"input {text}")
    for text in found.notes:
        click.echo(f"note: {text}")
    for names, (line, type_) in _alike([_gathered(text) for text in found.gathers]):
        click.echo(f"gathered whole on every rank: {line}: {names}: {type_}")
    for line in _sent(found.bytes_sent):
        click.echo(line)
    if symbols := _symbols(found.bytes_sent.values()):
        click.echo(f"where {symbols}")
    for text in found.refusals:
        click.echo(f"refused: {text}")
    click.echo("supported" if found.supported else "not supported")


_Row = TypeVar("_Row", bound=tuple[str, ...])


def _alike(rows: list[tuple[str, _Row]]) -> Iterator[tuple[str, _Row]]:
    """Rows of layers that differ in their number only are one: `blocks.0 and 3 layers like it`."""
    groups: dict[Any, list[str]] = {}
    for layer, row in rows:
        groups.setdefault((re.sub(r"\d+", "#", layer), row), []).append(layer)
    for (_, row), layers in groups.items():
        others = len(layers) - 1
        more = f" and {others} {'layer' if others == 1 else 'layers'} like it" if others else ""
        yield layers[0] + more, row


def _gathered(text: str) -> tuple[str, tuple[str, str]]:
    """`gpt.py:73: blocks.0.mlp: i64[1, 8]` as its layer, line and type."""
    line, layer, type_ = (part.strip() for part in text.rsplit(": ", 2))
    return layer, (line, type_)


def _sent(bytes_sent: dict[int, str]) -> Iterator[str]:
    """What ranks send in one run; those that send as much, together."""
    ranks: dict[str, list[str]] = {}
    for rank, amount in bytes_sent.items():
        ranks.setdefault(amount, []).append(str(rank))
    for amount, which in ranks.items():
        text = _amount(amount)
        if len(which) == len(bytes_sent) > 1:
            yield f"every rank sends {text} a run"
        elif len(which) == 1:
            yield f"rank {which[0]} sends {text} a run"
        else:
            yield f"ranks {', '.join(which)} send {text} a run each"


def _symbols(amounts: Iterable[str]) -> str:
    """What the symbols in amounts of bytes stand for, where one is printed as it is."""
    shown = [text for text in amounts if _plain(text) is None]
    used = {name for text in shown for name in re.findall(r"[a-z]\w*", text)}
    return "; ".join(f"{name}: {text}" for name, text in _MEANINGS.items() if name in used)


def _plain(text: str) -> re.Match[str] | None:
    """Bytes that are a number, or one for each sequence."""
    return re.fullmatch(r"(\d+)(\*b)?", text)


def _amount(text: str) -> str:
    """`2.1 MB`, `2.1 MB for each sequence`; bytes where a length is not known."""
    found = _plain(text)
    if found is None:
        return f"{text} bytes"
    return f"{int(found[1]) / 1e6:.4g} MB{' for each sequence' if found[2] else ''}"
