"""`ringcompile plan`: which parallel spec is fastest on a cluster, and why others are not."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import (
    CLUSTER,
    CONSOLE,
    JSON,
    gigabytes,
    milliseconds,
    print_table,
)
from ringcompile.cost.hardware import load_cluster
from ringcompile.later import Later
from ringcompile.options import DTYPES

if TYPE_CHECKING:
    from ringcompile import planning
    from ringcompile.cost import estimate
    from ringcompile.cost.planner import Plan
else:
    planning = Later("ringcompile.planning")
    estimate = Later("ringcompile.cost.estimate")


@click.command()
@click.argument("model")
@click.option("--gpus", type=click.IntRange(1), required=True, help="How many devices.")
@CLUSTER
@click.option("--seq", type=click.IntRange(1), default=16384, show_default=True,
              help="Tokens of a sequence.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True,
              help="Sequences of a step.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model first.")
@click.option("--top", type=click.IntRange(1), default=12, show_default=True,
              help="Plans to print; --json has all.")
@JSON
def plan(
    model: str,
    gpus: int,
    cluster: str,
    seq: int,
    batch: int,
    dtype: str | None,
    top: int,
    as_json: bool,
) -> None:
    """Rank all parallel specs of MODEL on so many devices by tokens a second; reads no weights."""
    ask = estimate.Ask(gpus, load_cluster(cluster).sized(gpus), seq, batch)
    with CONSOLE.status(f"planning {model}"):
        plans = planning.plans_for(model, ask, dtype)
    if as_json:
        click.echo(json.dumps([found.to_json() for found in plans], indent=2))
        return
    title = f"{model} on {gpus} x {ask.cluster.device.title}, {ask.tokens} tokens a step"
    _print(title, plans, top)


def _print(title: str, plans: list[Plan], top: int) -> None:
    fitting = [found for found in plans if found.tps is not None]
    rows = [
        [str(found.variant), f"{(found.tps or 0) / 1e6:.4g} M", milliseconds(found.seconds or 0),
         milliseconds(found.latency or 0), found.bound or "", gigabytes(found.memory_bytes or 0),
         found.why]
        for found in fitting[:top]
    ]
    columns = ["spec", "tokens/s", "TPOT", "latency", "bound by", "memory", "why"]
    print_table(title, columns, rows)
    if len(fitting) > top:
        click.echo(f"and {len(fitting) - top} slower ones; --json has all")
    reasons = Counter(found.why for found in plans if found.tps is None)
    for reason, count in reasons.most_common():
        click.echo(f"rejected {count}: {reason}")
