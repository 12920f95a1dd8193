"""The paper's table: what it claims, what is simulated, what kernels allow, and the best plan.

    python -m benchmarks.paper_table [--cluster h100x16] [--json FILE] [--page docs/paper.md]

Every step is simulated from the graphs that are emitted for all 16 ranks. Both methods are given
their best: orders and forms of the ring, schedules, two steps computed side by side, and for the
baseline steps that follow one another, so that its pipeline is full.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
import torch

from ringcompile import compiler
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.cost import limits
from ringcompile.cost.estimate import Ask
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.cost.node_times import node_times
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.planning import plans_for

ROOT = Path(__file__).parents[1]
NUM_GPUS, MICROBATCHES = 16, 8
BASELINE, PAPER = "pp=2,tp=8", "ring=16"
METHODS = {BASELINE: "TP=8 x PP=2", PAPER: "RA+SP"}
LENGTHS = (1024, 4096, 16384, 32768, 131072)
# tokens/s and ms of the paper's table, for "1024 tokens".
CLAIMS = {
    ("dense-4l", BASELINE): (1.20e6, 0.85), ("dense-4l", PAPER): (1.45e6, 0.70),
    ("moe-4l", BASELINE): (0.95e6, 1.05), ("moe-4l", PAPER): (1.18e6, 0.82),
}
MODELS = ("dense-4l", "moe-4l")
NUM_SEQUENCES = 16
SEVERAL = f"{NUM_SEQUENCES} sequences"


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One method on one model at one number of tokens a step.

    Attributes:
        form: the fastest of its forms.
        unhindered_tps: of the fastest form if the compute waited for nothing before it needs it,
            which is as far as any runtime could go; not known of the planner's plans.
        exposed_ms: seconds of a step that compute stands still for transfers; likewise.
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


@dataclass(frozen=True)
class Form:
    """A way to compile a method; see `ringcompile transform`."""

    order: str = "auto"
    ring: str = "rotate"
    overlap: str = "none"

    def __str__(self) -> str:
        said = [text for text in (self.order, self.ring) if text not in ("auto", "rotate")]
        return ", ".join([*said, *([self.overlap] if self.overlap != "none" else [])]) or "plain"


FORMS = {
    BASELINE: [Form(), Form(overlap="halves")],
    PAPER: [
        *(Form(order, "rotate", overlap)
          for order in ("zigzag", "contiguous") for overlap in ("none", "schedule", "halves")),
        Form("contiguous", "gather"),
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
        program, f"{spec},halves=2" if halves else spec, length=tokens, capacity="local",
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
    )


def kernel_limit(model: str, program: Program, tokens: int, cluster: Cluster) -> float:
    """Tokens/s if all ranks did nothing but products and causal attention at their best rates."""
    device = cluster.device
    return limits.kernel_limit(
        program, tokens, NUM_GPUS, top=2 if model == "moe-4l" else 0,
        matmul=device.get("matmul", torch.float16).highest(),
        attention=device.get("attention", torch.float16).highest(head_dim=512),
    )


def best(model: str, tokens: int, cluster: Cluster, batch: int = 1) -> Row:
    """The first of the planner's list."""
    plan = plans_for(model, Ask(NUM_GPUS, cluster, tokens, batch))[0]
    assert plan.tps is not None
    assert plan.seconds is not None
    assert plan.latency is not None
    method = f"{'best' if batch == 1 else SEVERAL}: {plan.variant}"
    return Row(
        model, method, tokens * batch, "", plan.tps, None, plan.seconds * 1e3,
        plan.latency * 1e3, None, plan.bound or "", (plan.memory_bytes or 0) / 1e9,
    )


def run(cluster: Cluster, lengths: tuple[int, ...]) -> Rows:
    """All rows; printed as they come."""
    rows: Rows = []
    for model in MODELS:
        loaded = load_model(model, weights=False)
        captured = capture(loaded.module, loaded.args, name=model)
        program = prepare(captured)
        weights = sum(weight.num_bytes for weight in captured.weights.values())
        limits_of = {n: kernel_limit(model, program, n, cluster) for n in (1024, *lengths)}
        for tokens in lengths:
            limit = limits_of[tokens]
            found = [simulated(model, program, spec, tokens, cluster) for spec in METHODS]
            for row in [*found, best(model, tokens, cluster)]:
                rows.append({**asdict(row), "kernel_limit_tps": limit, "weight_bytes": weights})
                click.echo(
                    f"{model:9} {tokens:7,} {row.method:12} {row.form:20} "
                    f"{row.tps / 1e6:6.3f} M tokens/s  step {row.step_ms:7.2f} ms  "
                    f"limit {limit / 1e6:.2f} M"
                )
        row = best(model, 1024, cluster, NUM_SEQUENCES)
        rows.append({**asdict(row), "kernel_limit_tps": limits_of[1024], "weight_bytes": weights})
        click.echo(f"{model:9} {row.tokens:7,} {row.method:40} {row.tps / 1e6:6.3f} M tokens/s")
    return rows


def of(rows: Rows, model: str, method: str, tokens: int) -> dict[str, Any]:
    """The row of a method, by how its name begins."""
    return next(
        row for row in rows
        if (row["model"], row["tokens"]) == (model, tokens) and row["method"].startswith(method)
    )


def millions(row: dict[str, Any], key: str = "tps") -> str:
    """Tokens a second as the tables write them."""
    return f"{row[key] / 1e6:.2f} M"


def table(heads: list[str], body: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *body]
    return [f"| {' | '.join(row)} |" for row in rows]


def page(rows: Rows, cluster: Cluster, plot: str) -> str:
    """docs/paper.md."""
    lengths = sorted({row["tokens"] for row in rows if not row["method"].startswith(SEVERAL)})
    head = (
        "*The paper* proposes ring attention with sequence parallelism (RA+SP) for multi-head "
        "attention. It reports\nthe throughput of two models of 4 layers, dense and mixture of "
        f"experts, on {NUM_GPUS} H100s, beside a baseline with TP=8 x PP=2.\nIts one table is for "
        "\"1024 tokens\"; it does not say whether these are all tokens or those of one rank.\n\n"
        "`python -m benchmarks.paper_table` made this page from the compiled programs of all "
        f"{NUM_GPUS} ranks and the hardware table\n`{cluster.name}` ({cluster.device.title}), "
        "which gives the source of each figure. Rates are tokens per second.\nThe kernels' limit "
        "is the rate if all ranks only ran matmuls and causal attention, at their best measured "
        "rates."
    )
    lines = ["# The paper's table, simulated", "", head, ""]
    for tokens, what in ((1024, "1,024 tokens in total"), (16384, "1,024 tokens per rank")):
        if tokens in lengths:
            lines += [f"## {what}", "", *_compared(rows, tokens), ""]
            lines += [*(_verdict(rows, model, tokens) for model in MODELS), ""]
    body = []
    for model in MODELS:
        for tokens in lengths:
            baseline, paper, plan = (of(rows, model, m, tokens) for m in ("TP=8", "RA+SP", "best"))
            body.append([
                model, f"{tokens:,}", millions(baseline), millions(paper),
                f"{millions(plan)}, `{plan['method'][6:]}`", millions(plan, "kernel_limit_tps"),
            ])
    heads = ["model", "tokens per step", "TP=8 x PP=2", "RA+SP", "best plan", "kernels' limit"]
    lines += ["## Why", "", *_reasons(rows, cluster), ""]
    lines += ["## Over lengths", "", f"![tokens per second over tokens per step]({plot})", ""]
    return "\n".join([*lines, *table(heads, body), ""])


def _compared(rows: Rows, tokens: int) -> list[str]:
    heads = ["model", "method", "paper", "simulated", "options", "step time",
             "exposed communication", "with ideal overlap", "kernels' limit"]
    body = []
    for model in MODELS:
        for spec, method in METHODS.items():
            (rate, step), row = CLAIMS[model, spec], of(rows, model, method, tokens)
            body.append([
                model, method, f"{rate / 1e6:.2f} M, {step:.2f} ms", millions(row), row["form"],
                f"{row['step_ms']:.2f} ms", f"{row['exposed_ms']:.2f} ms",
                millions(row, "unhindered_tps"), millions(row, "kernel_limit_tps"),
            ])
        row = of(rows, model, "best", tokens)
        body.append([model, f"`{row['method'][6:]}`", "", millions(row), "",
                     f"{row['step_ms']:.2f} ms", "", "", ""])
    return table(heads, body)


def _verdict(rows: Rows, model: str, tokens: int) -> str:
    """The ratio that the paper claims, as simulated; and whether its rate is to be had."""
    baseline, paper, plan = (of(rows, model, m, tokens) for m in ("TP=8", "RA+SP", "best"))
    rate = CLAIMS[model, PAPER][0]
    claimed = rate / CLAIMS[model, BASELINE][0] - 1
    if plan["tps"] >= rate:
        verdict = "the best plan reaches the claimed rate"
    elif paper["kernel_limit_tps"] >= rate:
        verdict = "kernels would allow the claimed rate, but no plan reaches it"
    else:
        verdict = "the claimed rate is beyond the kernels' limit"
    found = paper["tps"] / baseline["tps"] - 1
    return (f"- {model}: the gain of RA+SP over the baseline is {found:+.1%} as simulated and "
            f"{claimed:+.1%} as claimed; {verdict}.")


def _reasons(rows: Rows, cluster: Cluster) -> list[str]:
    """What the numbers come from, in words."""
    bandwidth = cluster.device.value("bandwidth")
    lines = []
    for model in MODELS:
        row = next(row for row in rows if row["model"] == model)
        read, claimed = row["weight_bytes"] / bandwidth * 1e3, CLAIMS[model, PAPER][1]
        verdict = " That is impossible with replicated weights." if read > claimed else ""
        lines.append(
            f"- {model}, 1,024 tokens in total: each rank of RA+SP has 64 of them and reads all "
            f"weights, {row['weight_bytes'] / 1e9:.2f} GB in {read:.2f} ms; the paper claims "
            f"{claimed:.2f} ms for the step.{verdict}"
        )
    for model in MODELS:
        baseline, paper = (of(rows, model, m, 16384) for m in ("TP=8", "RA+SP"))
        lines.append(
            f"- {model}, 1,024 tokens per rank: compute waits for communication for "
            f"{baseline['exposed_ms']:.1f} ms of a step of the baseline, and for "
            f"{paper['exposed_ms']:.1f} ms of RA+SP. With ideal overlap (two steps at a time, "
            "collectives waited for only where their result is used) the baseline would reach "
            f"{millions(baseline, 'unhindered_tps')}, RA+SP {millions(paper, 'unhindered_tps')}."
        )
    best_rows = [row for row in rows if row["method"].startswith("best")]
    piped = [row["tokens"] for row in best_rows if "pp=" in row["method"]]
    if piped:
        lines.append(
            f"- Up to {max(piped):,} tokens, pipelines are faster than both: a stage has few "
            "layers, so that a rank reads few weights, and few ranks exchange keys. Several steps "
            "are in the pipeline at a time."
        )
    for row in rows:
        if row["method"].startswith(SEVERAL):
            plan = row["method"].partition(": ")[2]
            free = ", without any communication" if plan == f"dp={NUM_GPUS}" else ""
            lines.append(
                f"- {row['model']}, {SEVERAL} of 1,024 tokens ({row['tokens']:,} per step): "
                f"`{plan}` reaches {millions(row)}{free}."
            )
    return lines


def draw(rows: Rows, file: Path) -> None:
    """Tokens a second over tokens a step, one panel a model."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for panel, model in zip(panels, MODELS, strict=True):
        own = [row for row in rows if row["model"] == model]
        for name, style in (("TP=8", "s--"), ("RA+SP", "o-"), ("best", "^-")):
            some = [row for row in own if row["method"].startswith(name)]
            label = {"TP=8": "TP=8 x PP=2", "best": "best plan"}.get(name, name)
            panel.plot([r["tokens"] for r in some], [r["tps"] / 1e6 for r in some], style,
                       label=label)
        limit = {
            row["tokens"]: row["kernel_limit_tps"] / 1e6 for row in own
            if row["method"].startswith("TP=8")
        }
        panel.plot(list(limit), list(limit.values()), "k:", label="kernels' limit")
        for spec, colour in ((BASELINE, "C0"), (PAPER, "C1")):
            panel.axhline(CLAIMS[model, spec][0] / 1e6, color=colour, alpha=0.3,
                          label=f"paper: {METHODS[spec]}")
        panel.set(title=model, xscale="log", xlabel="tokens a step",
                  ylabel="million tokens a second")
        panel.set_xticks(list(limit), [f"{x // 1024}k" for x in limit])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


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
    rows = run(hardware, lengths)
    file.write_text(json.dumps({"cluster": hardware.name, "rows": rows}, indent=1) + "\n")
    picture = page_file.with_suffix(".png")
    draw(rows, picture)
    page_file.write_text(page(rows, hardware, picture.name))


if __name__ == "__main__":
    sys.exit(main())
