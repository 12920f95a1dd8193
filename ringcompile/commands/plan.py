"""`ringcompile plan`: which parallel spec is fastest on a cluster, and why others are not."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ringcompile import compiler
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import DTYPES, load_model
from ringcompile.commands.options import (
    CLUSTER,
    CONSOLE,
    JSON,
    gigabytes,
    milliseconds,
    print_table,
)
from ringcompile.commands.overlap import HALVES, NONE
from ringcompile.cost.estimate import Ask, Model, Parallel
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.layers import cut, find_stack
from ringcompile.cost.node_times import node_times
from ringcompile.cost.planner import Plan, Planner
from ringcompile.cost.specs import Variant
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.passes.place import order_of
from ringcompile.passes.schedule import Schedule


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
    ask = Ask(gpus, load_cluster(cluster).sized(gpus), seq, batch)
    with CONSOLE.status(f"planning {model}"), _few_collections():
        plans = plans_for(model, ask, dtype)
    if as_json:
        click.echo(json.dumps([found.to_json() for found in plans], indent=2))
        return
    title = f"{model} on {gpus} x {ask.cluster.device.title}, {ask.tokens} tokens a step"
    _print(title, plans, top)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Graphs come and go by the hundred: looking for garbage every so often takes a fifth more."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(1_000_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def plans_for(model: str, ask: Ask, dtype: str | None = None) -> list[Plan]:
    """All plans for a model by name, as `ringcompile plan` prints them.

    Args:
        model: as `load_model` takes it.
        ask: devices, cluster, sequence and batch.
        dtype: to cast the model to.

    Raises:
        RingCompileError: the model cannot be captured, or nothing fits.
    """
    loaded = load_model(model, dtype=dtype, weights=":" in model)
    whole = capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name)
    if whole.batch != 1:
        raise RingCompileError(
            f"the example of '{model}' has {whole.batch} sequences, plans are made from one",
            hint="return an example with one sequence; --batch says how many a step has",
        )
    stack = find_stack(whole)
    prepared, checked = dict[tuple[int, bool], Program](), dict[Any, Any]()

    def ready(stages: int, halves: bool = False) -> Program:
        """A block for each of so many stages, or the model, as far as all specs have in common."""
        stages = stages if stack is not None and stack.stands_for(stages) else 0
        if (stages, halves) not in prepared:
            program = cut(whole, stack, stages) if stack is not None and stages else whole
            prepared[stages, halves] = (
                compiler.in_halves(None, program) if halves else compiler.prepare(program)
            )
        return prepared[stages, halves]

    def compile_(variant: Variant, length: int) -> Parallel:
        stages = variant.mesh.size("pp")
        starts = stack.starts(stages) if stack is not None else ()
        times = node_times(ask.cluster, length)
        schedule = Schedule(times) if variant.overlap != NONE else None
        return compiler.transform(
            ready(stages, variant.overlap == HALVES), variant.mesh, check=False, checked=checked,
            schedule=schedule, **variant.choices(length, starts),
        )

    total = sum(weight.num_bytes for weight in whole.weights.values())
    known = Model(stack, total, whole.length_range, order_of(ready(1)))
    return Planner(known, ask, compile_).run()


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
