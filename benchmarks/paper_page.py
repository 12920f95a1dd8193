"""The page and the picture of the paper's table, from the rows that `paper_table` simulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ringcompile.cost.hardware import Cluster

NUM_GPUS = 16
BASELINE, PAPER = "pp=2,tp=8", "ring=16"
METHODS = {BASELINE: "TP=8 x PP=2", PAPER: "RA+SP"}
# tokens/s and ms of the paper's table, for "1024 tokens".
CLAIMS = {
    ("dense-4l", BASELINE): (1.20e6, 0.85), ("dense-4l", PAPER): (1.45e6, 0.70),
    ("moe-4l", BASELINE): (0.95e6, 1.05), ("moe-4l", PAPER): (1.18e6, 0.82),
}
MODELS = ("dense-4l", "moe-4l")
NUM_SEQUENCES = 16
SEVERAL = f"{NUM_SEQUENCES} sequences"
# A long sequence on many nodes: the ring lies across them, Ulysses within.
MANY, MANY_TOKENS, MANY_FORM = "h100x8x2", 2**20, "ring=16,ulysses=8"
NUM_MANY = 128

Rows = list[dict[str, Any]]


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


def page(rows: Rows, long: dict[str, float], cluster: Cluster, plot: str) -> str:
    """docs/paper.md."""
    lengths = sorted({row["tokens"] for row in rows if not row["method"].startswith(SEVERAL)})
    head = (
        "*The paper* proposes ring attention with sequence parallelism (RA+SP) for multi-head "
        "attention. It reports\nthe throughput of two models of 4 layers, dense and mixture of "
        f"experts, on {NUM_GPUS} H100s, beside a baseline with TP=8 x PP=2.\nIts one table is for "
        "\"1024 tokens\"; it does not say whether these are all tokens or those of one rank.\n\n"
        "`python -m benchmarks.paper_table` made this page from the compiled programs of all "
        f"{NUM_GPUS} ranks and the hardware table\n`{cluster.name}` ({cluster.device.title}), "
        "which gives the source of each figure. Rates are tokens per second.\nRA+SP is sequence "
        "parallelism over all ranks, along `ring` or along `ring` and `ulysses`, whichever is "
        "faster. The kernels'\nlimit is the rate if all ranks only ran matmuls and causal "
        "attention, at their best measured rates."
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
                f"{plan['tps'] / plan['kernel_limit_tps']:.0%}",
            ])
    heads = ["model", "tokens per step", "TP=8 x PP=2", "RA+SP", "best plan", "kernels' limit",
             "best plan of it"]
    lines += ["## Why", "", *_reasons(rows, cluster), ""]
    lines += ["## Over lengths", "", f"![tokens per second over tokens per step]({plot})", ""]
    lines += [*table(heads, body), "", *_spent(rows, lengths)]
    return "\n".join([*lines, *_long(long)])


def _spent(rows: Rows, lengths: list[int]) -> list[str]:
    """Where the step of each best plan goes."""
    heads = ["model", "tokens per step", "step of the best plan", "matmuls and attention",
             "other kernels", "at the kernels' limit"]
    body = []
    for model in MODELS:
        for tokens in lengths:
            row = of(rows, model, "best", tokens)
            limit = tokens / row["kernel_limit_tps"] * 1e3
            times = (row["step_ms"], row["kernels_ms"], row["thin_ms"], limit)
            body.append([model, f"{tokens:,}", *(f"{ms:.2f} ms" for ms in times)])
    return [
        ("What keeps the best plans from the limit: matmuls of few rows and attention over few "
         "keys run at lower rates than the best ones.\nOther kernels (norms, rotary embedding, "
         "activations, residuals, what is packed and sorted) are one for each fused group, and "
         "read and write at\nwhat torch's own kernels reach by the table, 1.1 to 3 TB/s. The rest "
         "of a step are transfers, and stages that wait."), "", *table(heads, body), "",
    ]


def _long(row: dict[str, float]) -> list[str]:
    share = row["compute_ms"] / row["step_ms"]
    return [
        f"## {MANY_TOKENS:,} tokens on {NUM_MANY} GPUs", "",
        (f"dense-4l as `{MANY_FORM} --order zigzag --overlap schedule` on {NUM_MANY // 8} nodes of "
         f"8 (`{MANY}`), one sequence: a step takes {row['step_ms']:,.0f} ms,\nof which ranks "
         f"compute {row['compute_ms']:,.0f} ms on average ({share:.1%}). No rank waits "
         f"longer than {row['exposed_ms']:,.0f} ms in all;\nthe most that one sends is "
         f"{row['sent_gb']:.1f} GB."),
        "",
    ]


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
