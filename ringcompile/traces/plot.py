"""Timelines as a picture: a row for each track of each rank, a colour for each kind of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.held import whole_file

SUFFIXES = (".png", ".svg", ".pdf")
_COLORS = {
    "matmul": "#5b8def", "compute": "#5b8def", "attention": "#9466e0", "memory": "#7fb77e",
    "weights": "#3f9c8b", "communication": "#e08a1e", "wait": "#d5d9e0", "host": "#8b93a1",
    "launch": "#8b93a1", "interference": "#d9534f",
}
_OTHER = "#7fb77e"
_ROW = 0.28  # inches
_ALIKE = 4  # timelines of which one takes so many times as long share a scale


@dataclass(frozen=True)
class Bar:
    """A slice of a timeline that was written to a file.

    Attributes:
        rank: the rank.
        track: "compute", "host", or the mesh axis of a transfer.
        value: the value's name in `dump`, such as `%12`; empty where it has none.
        kind: of the work.
        start: in microseconds.
        length: likewise.
    """

    rank: int
    track: str
    value: str
    kind: str
    start: float
    length: float


def bars_of(events: Mapping[str, Any]) -> list[Bar]:
    """The slices of a timeline, from what `to_events` made or `read_events` read.

    Raises:
        RingCompileError: they are not as `to_events` makes them.
    """
    try:
        rows = events["traceEvents"]
        tracks = {(row["pid"], row["tid"]): str(row["args"]["name"]) for row in rows
                  if row["ph"] == "M" and row["name"] == "thread_name"}
        return [
            Bar(int(row["args"]["rank"]), tracks[row["pid"], row["tid"]],
                str(row["args"].get("value", "")), str(row["cat"]), float(row["ts"]),
                float(row["dur"]))
            for row in rows if row["ph"] == "X"
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RingCompileError(
            f"the trace is damaged: {type(error).__name__}: {error}", hint="write it again"
        ) from None


def check_picture(file: Path) -> None:
    """See before the work whether a picture can be drawn.

    Raises:
        RingCompileError: an unknown suffix, or matplotlib is not installed.
    """
    if file.suffix not in SUFFIXES:
        raise RingCompileError(
            f"'{file}': unknown suffix '{file.suffix}'",
            hint=f"name the picture with one of: {', '.join(SUFFIXES)}",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RingCompileError(
            "a picture needs matplotlib, which is not installed",
            hint="pip install 'ringcompile[plot]'",
        ) from None


def draw(file: Path, timelines: Sequence[Mapping[str, Any]]) -> None:
    """Draw timelines beside one another, on the same scale where that shows all of them.

    Args:
        file: the picture; see `check_picture`.
        timelines: from `to_events` or `read_events`.

    Raises:
        RingCompileError: a timeline is damaged, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    drawn = [bars_of(events) for events in timelines]
    rows = sorted({_row(bar) for bars in drawn for bar in bars}, reverse=True)
    figure = Figure(figsize=(7.0 * len(drawn), 1.6 + _ROW * len(rows)), layout="constrained")
    ends = [max((bar.start + bar.length for bar in bars), default=1.0) for bars in drawn]
    one_scale = max(ends) <= _ALIKE * min(ends)
    panels = figure.subplots(1, len(drawn), sharex=one_scale, sharey=True, squeeze=False)[0]
    for panel, bars, events in zip(panels, drawn, timelines, strict=True):
        _draw_one(panel, bars, rows)
        panel.set_title(str(events.get("otherData", {}).get("title", "")), fontsize=9, loc="left")
        panel.set_xlabel("ms" if one_scale else "ms (each timeline on a scale of its own)")
    panels[0].set_yticks(range(len(rows)), [f"rank {rank} {track}" for rank, _, track in rows],
                         fontsize=8)
    shown = {bar.kind: None for bars in drawn for bar in bars}
    patches = [panels[0].barh([0], [0], color=_COLORS.get(kind, _OTHER)) for kind in shown]
    figure.legend(patches, list(shown), loc="outside lower center", ncols=len(shown), fontsize=8)
    try:
        with whole_file(file) as partial:
            figure.savefig(partial, dpi=130)
    except OSError as error:
        raise RingCompileError(f"cannot write '{file}': {error}") from None


def _row(bar: Bar) -> tuple[int, bool, str]:
    """Its rank, whether it is a transfer, and its track: the order of rows, from the top."""
    return bar.rank, bar.track != "compute", bar.track


def _draw_one(panel: Any, bars: list[Bar], rows: list[tuple[int, bool, str]]) -> None:
    number = {row: i for i, row in enumerate(rows)}
    groups: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for bar in bars:
        spans = groups.setdefault((number[_row(bar)], bar.kind), [])
        spans.append((bar.start / 1e3, bar.length / 1e3))
    for (row, kind), spans in groups.items():
        panel.broken_barh(spans, (row - 0.4, 0.8), color=_COLORS.get(kind, _OTHER), linewidth=0)
