"""`ringcompile run`: an artifact on local processes, or in a torchrun job."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import JSON
from ringcompile.later import Later
from ringcompile.options import BACKENDS

if TYPE_CHECKING:
    from ringcompile import execution
else:
    execution = Later("ringcompile.execution")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--nproc", type=click.IntRange(1), help="Number of local processes (world size).")
@click.option("--backend", type=click.Choice(["auto", *BACKENDS]), default="auto",
              show_default=True)
@click.option("--inputs", type=click.Path(path_type=Path), help="Whole inputs, safetensors.")
@click.option("--outputs", type=click.Path(path_type=Path), help="Where to write whole outputs.")
@click.option("--seq", type=click.IntRange(1), default=128, show_default=True,
              help="Length of random inputs, where none are given.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds.")
@click.option("--join-timeout", type=float, default=120.0, show_default=True,
              help="Seconds to wait for all ranks, on all hosts, to be there.")
@click.option("--compile", "compiled", is_flag=True,
              help="torch.compile what is computed between communications.")
@JSON
def run(
    out: Path,
    nproc: int | None,
    backend: str,
    inputs: Path | None,
    outputs: Path | None,
    seq: int,
    timeout: float,
    join_timeout: float,
    compiled: bool,
    as_json: bool,
) -> None:
    """Run the artifact OUT on local processes; under torchrun, join the job that is there."""
    found = execution.run_artifact(
        out, nproc=nproc, backend=backend, inputs=inputs, outputs=outputs, length=seq,
        timeout=timeout, join_timeout=join_timeout, compiler="inductor" if compiled else None,
    )
    if found is None:  # another rank of a torchrun job reports
        return
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(f"{found.ranks} ranks over {found.backend}, {found.seconds:.3f} s")
    for name, text in found.outputs.items():
        click.echo(f"  {name}: {text}")
    for rank, sent in enumerate(found.bytes_sent):
        click.echo(f"  rank {rank} sent {sent:,} bytes")
