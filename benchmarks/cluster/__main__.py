"""All that a cluster is measured for, in one command.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m benchmarks.cluster
    torchrun --nproc-per-node 4 -m benchmarks.cluster --dry-run     # a rehearsal on CPUs

Measures devices and links into a hardware table, compares numbers of both of the paper's models
with one device, and times the paper's methods and the planner's best plan beside what the table
simulates. Rank 0 writes one JSON, as it goes, and one page.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch.distributed as dist

from benchmarks.cluster import steps
from benchmarks.cluster.hardware import decided, measured_table, nodes_of
from benchmarks.cluster.page import page, right
from benchmarks.cluster.plans import Method, best, papers
from benchmarks.gpu.report import environment
from ringcompile.cost.hardware import read_cluster
from ringcompile.errors import RingCompileError
from ringcompile.held import whole_file
from ringcompile.mesh import Mesh
from ringcompile.runtime.join import Rank, join_torchrun, leave

MODELS = ("dense-4l", "moe-4l")
TINY = tuple(f"{name}-tiny" for name in MODELS)


@dataclass
class Found:
    """What is known so far; rank 0 writes it down whenever something is added.

    Attributes:
        rank: this process' place.
        out: the folder that files go to.
        facts: what was measured.
    """

    rank: Rank
    out: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def set(self, name: str, value: Any) -> None:
        """Note a fact."""
        self.facts[name] = value
        self._write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Note a row of a table."""
        if self.rank.index == 0:
            shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            click.echo(f"  {'  '.join(shown)}")
        self.facts.setdefault(name, []).append(row)
        self._write()

    def _write(self) -> None:
        if self.rank.index > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        texts = {"cluster.json": json.dumps(self.facts, indent=1) + "\n",
                 "cluster.md": page(self.facts)}
        if "table" in self.facts:
            texts["table.json"] = json.dumps(self.facts["table"], indent=1) + "\n"
        for name, text in texts.items():
            with whole_file(self.out / name) as partial:
                partial.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Work:
    """What is run.

    Attributes:
        models: of the zoo.
        lengths: tokens of a sequence.
        rounds: steps of each plan.
        dry: whether devices and links are measured on few small sizes.
    """

    models: tuple[str, ...]
    lengths: tuple[int, ...]
    rounds: int
    dry: bool


def run(rank: Rank, work: Work, per_node: int | None, found: Found) -> None:
    """All sections in turn; all ranks call it."""
    nodes = nodes_of(rank, per_node)
    found.facts["dry"] = work.dry
    found.set("environment", {
        **environment(), "nodes": nodes.count, "per_node": nodes.per_node,
        "backend": dist.get_backend(),
    })
    _say(rank, "devices and links")
    measured = measured_table(rank, nodes, quick=work.dry)
    table = decided(rank, lambda: measured)  # all compile and plan by the same figures
    found.set("table", table)
    cluster = read_cluster(table, "what was measured")
    for model in work.models:
        for length in work.lengths:
            _say(rank, f"{model}, {length} tokens: numbers")
            want = steps.reference(rank, model, length)
            for method in papers(rank.world_size):
                made = method.compiled(model, length, cluster)
                found.add("numbers", steps.numbers(rank, model, method, made, want, length))
            _say(rank, f"{model}, {length} tokens: steps")
            chosen = best(rank, model, length, cluster)
            for method in _methods(rank, chosen):
                found.add("steps", steps.step(rank, model, method, cluster, length, work.rounds))


def _methods(rank: Rank, chosen: Method) -> Iterator[Method]:
    yield from papers(rank.world_size, capacity="local")
    yield chosen


def _say(rank: Rank, what: str) -> None:
    if rank.index == 0:
        click.echo(f"== {what}")


@click.command()
@click.option("--dry-run", is_flag=True, help="A rehearsal: tiny models, few sizes, few steps.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("cluster"), show_default=True,
              help="Folder for the JSON, the page and the hardware table.")
@click.option("--model", "models", multiple=True, help="Of the zoo; by default both of the paper.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(1),
              help="Tokens of a sequence; by default 1024 and 16384.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--backend", type=click.Choice(["auto", "gloo", "nccl"]), default="auto",
              show_default=True)
@click.option("--per-node", type=click.IntRange(1),
              help="Ranks that count as one node; by default those that torchrun started on it.")
def main(
    dry_run: bool, out: Path, models: tuple[str, ...], lengths: tuple[int, ...], rounds: int,
    backend: str, per_node: int | None,
) -> None:
    """Measure a cluster; every rank of the job runs this."""
    try:
        wrong = measure(Path(out), Work(
            models or (TINY if dry_run else MODELS),
            lengths or ((64,) if dry_run else (1024, 16384)),
            min(rounds, 3) if dry_run else rounds, dry_run,
        ), backend, per_node)
    except RingCompileError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    sys.exit(wrong)


def measure(out: Path, work: Work, backend: str, per_node: int | None) -> bool:
    """Join the job and measure; whether any numbers are wrong."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    noun = "rank" if world_size == 1 else "ranks"
    if world_size % 2:
        raise RingCompileError(f"the job has {world_size} {noun}, the paper's methods need an even "
                               "number", hint="start it with torchrun --nproc-per-node 4")
    rank = join_torchrun(Mesh.parse(f"ring={world_size}"), backend=backend)
    found = Found(rank, out)
    run(rank, work, per_node, found)
    if rank.index == 0:
        click.echo(f"wrote {out / 'cluster.json'}, {out / 'cluster.md'} and {out / 'table.json'}")
    leave()
    wrong = [row for row in found.facts["numbers"] if not right(row)]
    for row in wrong if rank.index == 0 else ():
        click.echo(f"wrong numbers: {row['model']}, {row['parallel']}: largest error "
                   f"{row['max_error']:.3g}, {row['tokens_off']} tokens off", err=True)
    return bool(wrong)


if __name__ == "__main__":
    main()
