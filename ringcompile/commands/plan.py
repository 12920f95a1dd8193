"""`ringcompile plan`: which parallel spec is fastest on a cluster, and why others are not."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ringcompile.commands.options import (
    CLUSTER,
    CONTEXT,
    DTYPE,
    FUSE,
    JSON,
    MODEL,
    NEW_TOKENS,
    milliseconds,
    print_table,
    size_text,
    working,
)
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.garbage import few_collections
from ringcompile.later import Later
from ringcompile.options import NONE

if TYPE_CHECKING:
    from ringcompile import generation_plans, planning
    from ringcompile.cost import estimate
    from ringcompile.cost import plans as reasons
    from ringcompile.cost.plans import Plan
else:
    generation_plans = Later("ringcompile.generation_plans")
    planning = Later("ringcompile.planning")
    estimate = Later("ringcompile.cost.estimate")
    reasons = Later("ringcompile.cost.plans")

_SHOWN = 2  # specs of each kind of reason


@click.command()
@MODEL
@click.option("--gpus", type=click.IntRange(1), required=True, metavar="N",
              help="Number of devices.")
@CLUSTER
@click.option("--seq", type=click.IntRange(1), default=16384, show_default=True, metavar="N",
              help="Sequence length in tokens.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Number of sequences in a step.")
@NEW_TOKENS
@CONTEXT
@DTYPE
@FUSE
@click.option("--top", type=click.IntRange(1), default=12, show_default=True,
              metavar="N", help="Number of plans to print. --json prints all.")
@JSON
@few_collections()
def plan(
    model: str,
    gpus: int,
    cluster: str,
    seq: int,
    batch: int,
    new_tokens: int | None,
    context: int | None,
    dtype: str | None,
    fuse: bool,
    top: int,
    as_json: bool,
) -> None:
    """Rank all parallel specs for MODEL on a cluster.

    They are ranked by estimated tokens per second. Weights are not read. With --new-tokens they are
    ranked for generation: TTFT is the time from the request to the first token, TPOT the time per
    output token after it.
    """
    if new_tokens is not None:
        request = generation_plans.GenerationRequest(context or seq, new_tokens, batch, fuse)
        _generation(model, load_cluster(cluster).sized(gpus), request, dtype, top, as_json)
        return
    if context is not None:
        raise click.UsageError("--context needs --new-tokens")
    ask = estimate.Ask(gpus, load_cluster(cluster).sized(gpus), seq, batch)
    with working(f"planning {model}"):
        plans = planning.plans_for(model, ask, dtype, fuse=fuse)
    if as_json:
        click.echo(json.dumps([found.to_json() for found in plans], indent=2))
        return
    title = f"{model} on {gpus} x {ask.cluster.device.title}, {ask.tokens} tokens a step"
    _print(title, plans, top)
    click.echo(f"next: {_command(plans[0], model, cluster, seq, dtype, fuse)}")


def _command(
    best: Plan, model: str, cluster: str, seq: int, dtype: str | None, fuse: bool
) -> str:
    """What compiles the best plan."""
    words = ["ringcompile", "transform", shlex.quote(model), "-o", "out", "--parallel",
             str(best.variant), "--seq", str(seq)]
    if best.variant.overlap != NONE:
        words += ["--overlap-on", shlex.quote(cluster)]
    words += [] if fuse else ["--no-fuse"]
    return " ".join([*words, *(["--dtype", dtype] if dtype else [])])


def _generation(
    model: str,
    hardware: Cluster,
    request: generation_plans.GenerationRequest,
    dtype: str | None,
    top: int,
    as_json: bool,
) -> None:
    with working(f"planning {model}"):
        plans = generation_plans.generation_plans(model, hardware, request, dtype)
    if as_json:
        click.echo(json.dumps([found.to_json(request.batch) for found in plans], indent=2))
        return
    fitting = [found for found in plans if found.fits]
    title = (f"{model} on {hardware.num_devices} x {hardware.device.title}, batch {request.batch}, "
             f"{request.context} tokens and {request.new_tokens} new ones")
    rows = [
        [str(found), milliseconds(found.ttft or 0), milliseconds(found.tpot or 0),
         f"{request.batch / (found.tpot or 1):,.1f}", size_text(found.memory_bytes or 0),
         ", ".join(found.serves), found.why]
        for found in fitting[:top]
    ]
    columns = ["spec", "TTFT", "TPOT", "tokens/s", "memory", "best for", "a token's time"]
    print_table(title, columns, rows)
    if len(fitting) > top:
        click.echo(f"and {len(fitting) - top} slower ones; --json has all")
    for why, count in Counter(found.why for found in plans if not found.fits).most_common():
        click.echo(f"rejected {count}: {why}")


def _print(title: str, plans: list[Plan], top: int) -> None:
    fitting = [found for found in plans if found.tps is not None]
    rows = [
        [str(found.variant), f"{(found.tps or 0) / 1e6:.4g} M", milliseconds(found.seconds or 0),
         milliseconds(found.latency or 0), found.bound or "", size_text(found.memory_bytes or 0),
         found.why]
        for found in fitting[:top]
    ]
    columns = ["--parallel", "tokens/s", "step time", "latency", "bound by", "memory",
               "share of the critical path"]
    print_table(title, columns, rows)
    if len(fitting) > top:
        click.echo(f"and {len(fitting) - top} slower ones; --json has all")
    if any(found.variant.mesh.size("pp") > 1 for found in fitting[:top]):
        click.echo("with pp: step time is the time between two steps while the pipeline is full, "
                   "latency that of one step alone")
    for line in _rejections(plans):
        click.echo(line)


def _rejections(plans: list[Plan]) -> Iterator[str]:
    """A line for each kind of reason, with a spec or two of each."""
    kinds: dict[str, list[Plan]] = {}
    for found in plans:
        if found.tps is None:
            # What the compiler refuses, it refuses for reasons of its own.
            text = re.sub(r"\d+", "N", found.why) if found.reason == reasons.REFUSED else ""
            kinds.setdefault(f"{found.reason}: {text}".rstrip(": "), []).append(found)
    for alike in sorted(kinds.values(), key=len, reverse=True):
        shown = "; ".join(f"{found.variant}: {found.why}" for found in alike[:_SHOWN])
        more = f"; and {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
        yield f"rejected {len(alike)}, {alike[0].reason} ({shown}{more})"
