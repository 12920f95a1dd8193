"""The paper's table: what it claims, what is simulated, what kernels allow, and the best plan.

    python -m benchmarks.paper_table [--cluster h100x16] [--json FILE] [--page docs/paper.md]

Every step is simulated from the graphs that are emitted for all ranks. Both methods are given
their best: orders and forms of the ring, the ring beside Ulysses, schedules, two steps computed
side by side, and for the baseline steps that follow one another, so that its pipeline is full.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch

from benchmarks.paper_page import (
    BASELINE,
    MANY,
    MANY_FORM,
    MANY_TOKENS,
    METHODS,
    MODELS,
    NUM_GPUS,
    NUM_MANY,
    NUM_SEQUENCES,
    PAPER,
    SEVERAL,
    Rows,
    draw,
    page,
)
from ringcompile import compiler
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.cost import limits
from ringcompile.cost.estimate import Ask
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.cost.kernels import time_of
from ringcompile.cost.node_times import node_times
from ringcompile.cost.rank import RankCost, cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.planning import plans_for

ROOT = Path(__file__).parents[1]
MICROBATCHES = 8
LENGTHS = (1024, 4096, 16384, 32768, 131072)


@dataclass(frozen=True)
class Row:
    """One method on one model at one number of tokens a step.

    Attributes:
        form: the fastest of its forms.
        unhindered_tps: of the fastest form if the compute waited for nothing before it needs it,
            which is as far as any runtime could go; not known of the planner's plans.
        exposed_ms: seconds of a step that compute stands still for transfers; likewise.
        kernels_ms: of the rank that computes longest, in matmuls and attention.
        thin_ms: of the same rank, in all other kernels.
    """

    model: str
    method: str
    tokens: int
    form: str
    tps: float
    unhindered_tps: float | None
    step_ms: float
    latency_ms: float
    exposed_ms: float | None
    bound: str
    memory_gb: float
    kernels_ms: float
    thin_ms: float


@dataclass(frozen=True)
class Form:
    """A way to compile a method; see `ringcompile transform`."""

    spec: str
    order: str = "auto"
    ring: str = "rotate"
    overlap: str = "none"

    def __str__(self) -> str:
        said = [text for text in (self.order, self.ring) if text not in ("auto", "rotate")]
        said += [self.overlap] if self.overlap != "none" else []
        return " ".join([f"`{self.spec}`", ", ".join(said)]).strip()


FORMS = {
    BASELINE: [Form(BASELINE), Form(BASELINE, overlap="halves")],
    PAPER: [
        *(Form(PAPER, order, "rotate", overlap)
          for order in ("zigzag", "contiguous") for overlap in ("none", "schedule", "halves")),
        Form(PAPER, "contiguous", "gather"),
        *(Form(spec, "zigzag", overlap=overlap) for spec in ("ring=4,ulysses=4", "ring=2,ulysses=8")
          for overlap in ("none", "schedule")),
    ],
}


def simulated(
    model: str, program: Program, spec: str, tokens: int, cluster: Cluster
) -> Row:
    """One method's fastest form, all ranks; experts count their own tokens, as the paper's do."""
    rows = [_simulated(model, program, spec, form, tokens, cluster) for form in FORMS[spec]]
    fastest = max(rows, key=lambda row: row.tps)
    return replace(fastest, unhindered_tps=max(row.unhindered_tps or 0.0 for row in rows))


def _simulated(
    model: str, program: Program, spec: str, form: Form, tokens: int, cluster: Cluster
) -> Row:
    halves = form.overlap == "halves"
    schedule = Schedule(node_times(cluster, tokens)) if form.overlap != "none" else None
    made = compiler.transform(
        program, form.spec + ",halves=2" * halves, length=tokens, capacity="local",
        order=form.order, ring=form.ring, schedule=schedule, check=False,
    )
    costs = [cost_of(rank, tokens) for rank in made.ranks()]
    count = MICROBATCHES if "pp" in spec else 1
    found, deferred = (
        simulate(costs, cluster, How(count, deferred=flag, merged=True)) for flag in (False, True)
    )
    once = simulate(costs, cluster, How(merged=True))
    steps = 2 if halves else 1  # a run is two steps of `tokens`
    period = found.period / steps
    return Row(
        model, METHODS[spec], tokens, str(form), tokens / period,
        tokens * steps / deferred.period, period * 1e3, once.seconds * 1e3,
        once.exposed_seconds * 1e3 / steps, found.bound, found.memory_bytes / 1e9,
        *(ms / steps for ms in busy(costs, cluster)),
    )


def busy(costs: Sequence[RankCost], cluster: Cluster) -> tuple[float, float]:
    """Milliseconds of the busiest rank: in matmuls and attention, and in its other kernels."""
    found = []
    for cost in costs:
        kernels = thin = 0.0
        for kernel in (kernel for step in cost.steps for kernel in step.kernels):
            ms = time_of(kernel, cluster.device).seconds * 1e3
            if kernel.kind == "matmul" or kernel.kind.startswith("attention"):
                kernels += ms
            else:
                thin += ms
        found.append((kernels, thin))
    return max(found, key=sum)


def kernel_limit(model: str, program: Program, tokens: int, cluster: Cluster) -> float:
    """Tokens/s if all ranks did nothing but products and causal attention at their best rates."""
    device = cluster.device
    return limits.kernel_limit(
        program, tokens, NUM_GPUS, top=2 if model == "moe-4l" else 0,
        matmul=device.get("matmul", torch.float16).highest(),
        attention=device.get("attention", torch.float16).highest(head_dim=512),
    )


def best(model: str, program: Program, tokens: int, cluster: Cluster, batch: int = 1) -> Row:
    """The first of the planner's list."""
    plan = plans_for(model, Ask(NUM_GPUS, cluster, tokens, batch))[0]
    assert plan.tps is not None
    assert plan.seconds is not None
    assert plan.latency is not None
    method, chosen = f"{'best' if batch == 1 else SEVERAL}: {plan.variant}", plan.variant
    mesh = chosen.mesh
    made = compiler.transform(
        program, mesh.with_axis("halves", 2) if chosen.overlap == "halves" else mesh,
        **chosen.choices(tokens), check=False,
    )
    together = batch // (mesh.size("dp") * chosen.microbatches) or None
    costs = [cost_of(rank, tokens, together) for rank in made.ranks()]
    return Row(
        model, method, tokens * batch, "", plan.tps, None, plan.seconds * 1e3,
        plan.latency * 1e3, None, plan.bound or "", (plan.memory_bytes or 0) / 1e9,
        *(ms * chosen.microbatches / chosen.sequences for ms in busy(costs, cluster)),
    )


def captured(model: str) -> Program:
    """One of the two models, without weights."""
    loaded = load_model(model, weights=False)
    return capture(loaded.module, loaded.args, name=model)


def many() -> dict[str, float]:
    """The dense model over one long sequence on 128 devices: what of a step is compute."""
    program = prepare(captured("dense-4l"))
    cluster = load_cluster(MANY).sized(NUM_MANY)
    made = compiler.transform(
        program, MANY_FORM, length=MANY_TOKENS, order="zigzag", check=False,
        schedule=Schedule(node_times(cluster, MANY_TOKENS)),
    )
    found = simulate([cost_of(rank, MANY_TOKENS) for rank in made.ranks()], cluster)
    computed = [rank.compute_seconds for rank in found.ranks]
    row = {
        "step_ms": found.seconds * 1e3, "exposed_ms": found.exposed_seconds * 1e3,
        "compute_ms": sum(computed) / len(computed) * 1e3,
        "sent_gb": max(rank.bytes_sent for rank in found.ranks) / 1e9,
    }
    click.echo(f"{MANY_FORM} on {NUM_MANY}: {row}")
    return row


def run(cluster: Cluster, lengths: tuple[int, ...]) -> Rows:
    """All rows; printed as they come."""
    rows: Rows = []
    for model in MODELS:
        whole = captured(model)
        program = prepare(whole)
        weights = sum(weight.num_bytes for weight in whole.weights.values())
        limits_of = {n: kernel_limit(model, program, n, cluster) for n in (1024, *lengths)}
        for tokens in lengths:
            limit = limits_of[tokens]
            found = [simulated(model, program, spec, tokens, cluster) for spec in METHODS]
            for row in [*found, best(model, program, tokens, cluster)]:
                rows.append({**asdict(row), "kernel_limit_tps": limit, "weight_bytes": weights})
                click.echo(
                    f"{model:9} {tokens:7,} {row.method:12} {row.form:20} "
                    f"{row.tps / 1e6:6.3f} M tokens/s  step {row.step_ms:7.2f} ms  "
                    f"limit {limit / 1e6:.2f} M"
                )
        row = best(model, program, 1024, cluster, NUM_SEQUENCES)
        rows.append({**asdict(row), "kernel_limit_tps": limits_of[1024], "weight_bytes": weights})
        click.echo(f"{model:9} {row.tokens:7,} {row.method:40} {row.tps / 1e6:6.3f} M tokens/s")
    return rows


@click.command()
@click.option("--cluster", default="h100x16", show_default=True)
@click.option("--length", "lengths", multiple=True, type=int, default=LENGTHS, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path),
              default=ROOT / "benchmarks" / "results" / "paper-table.json")
@click.option("--page", "page_file", type=click.Path(path_type=Path),
              default=ROOT / "docs" / "paper.md")
def main(cluster: str, lengths: tuple[int, ...], file: Path, page_file: Path) -> None:
    """Simulate the paper's table and write the page."""
    hardware = load_cluster(cluster).sized(NUM_GPUS)
    rows, long = run(hardware, lengths), many()
    found = {"cluster": hardware.name, "rows": rows, "long": long}
    file.write_text(json.dumps(found, indent=1) + "\n")
    picture = page_file.with_suffix(".png")
    draw(rows, picture)
    page_file.write_text(page(rows, long, hardware, picture.name))


if __name__ == "__main__":
    sys.exit(main())
