"""The page that a run of `benchmarks.cluster` ends with, made from its JSON alone."""

from __future__ import annotations

from typing import Any

from benchmarks.paper_page import table

_NUMBERS = {"model": "model", "method": "method", "parallel": "parallel", "tokens": "tokens",
            "max_error": "largest error", "rms_error": "RMS error", "tokens_off": "tokens off",
            "verdict": ""}
_STEPS = {"model": "model", "method": "method", "parallel": "parallel", "tokens": "tokens a step",
          "simulated_ms": "simulated, ms", "measured_ms": "measured, ms",
          "simulated_over_measured": "simulated / measured", "tokens_per_second": "tokens a second",
          "transfers_ms": "transfers, ms", "waits_ms": "waits, ms", "hidden": "hidden"}


_ABOUT = ("{nodes} x {per_node} ranks (nodes x ranks of each) on {device}, {backend}, "
          "torch {torch}, {date}.")
_REHEARSAL = "A rehearsal with small models and few sizes: no time on this page means anything."
_OF_NUMBERS = """All ranks together against one device in float64; errors are relative to the
largest number and to the RMS. A token is off where its error is above 0.005: in a mixture an expert
may be chosen otherwise, where two score alike in the model's precision."""
_OF_STEPS = """Simulated by the table of links and devices that was measured here. Transfers and
waits are those of the rank whose transfers take longest, from a trace; "hidden" is the share of
their time in which the rank computed as well."""
# Of all tokens of a mixture, the share that may go to other experts because two score alike.
_MAY_DIFFER = 0.01


def right(row: dict[str, Any]) -> bool:
    """Whether a row of numbers agrees with one device: see `benchmarks.gpu.lockstep`."""
    allowed = row["tokens"] * _MAY_DIFFER if row["model"].startswith("moe") else 0
    return bool(row["tokens_off"] <= allowed)


def page(found: dict[str, Any]) -> str:
    """A page in Markdown.

    Args:
        found: what the run measured; sections that are missing were not reached.
    """
    about = found["environment"]
    lines = [
        "# What this cluster does", "",
        _ABOUT.format(**about), *([_REHEARSAL] if found["dry"] else []), "",
        "## Links", "", *_links(found.get("table")), "",
        "## Numbers", "", _OF_NUMBERS, "",
        *_rows(_judged(found.get("numbers", [])), _NUMBERS), "",
        "## Steps", "", _OF_STEPS, "", *_rows(found.get("steps", []), _STEPS), "",
    ]
    return "\n".join(lines)


def _judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "verdict": "right" if right(row) else "WRONG"} for row in rows]


def _links(made: dict[str, Any] | None) -> list[str]:
    if made is None:
        return ["Not measured."]
    body = []
    for name, figures in made["links"].items():
        for field, figure in figures.items():
            value = figure["value"]
            values = value if isinstance(value, list) else [value]
            sizes = figure.get("axes", {}).get("bytes", [])
            of = f"{sizes[0]:,} to {sizes[-1]:,} bytes" if sizes else ""
            text = ", ".join(f"{one:.4g}" for one in values)
            body.append([name, field, f"{text} {figure['unit']}", of])
    return table(["link", "figure", "value", "of"], body) if body else ["One rank: no links."]


def _rows(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    if not rows:
        return ["Not measured."]
    return table(list(columns.values()), [[_text(row[key]) for key in columns] for row in rows])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
