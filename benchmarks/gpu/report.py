"""Rows of numbers, written as soon as they are known, and printed as tables at the end."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"
_PACKAGES = ("torch", "triton", "ffpa-attn", "ringcompile")


def environment() -> Row:
    """What a reader needs to judge a number by."""
    found: Row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": "CPU",
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


class Report:
    """The rows of one section, in a file of their own that is whole at any time.

    Args:
        file: where they go.
        section: what they are.
    """

    def __init__(self, file: Path, section: str) -> None:
        self.file = file
        self.found: Row = {"section": section, "environment": environment(), "rows": []}

    def add(self, **row: Any) -> None:
        """Note a row, and write the file anew."""
        self.found["rows"].append(row)
        print("  " + "  ".join(f"{k}={_text(v)}" for k, v in row.items()), flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        part.replace(self.file)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same kind below each other; a new head where the columns change."""
    lines: list[str] = []
    blocks: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if not blocks or list(blocks[-1][0]) != list(row):
            blocks.append([])
        blocks[-1].append(row)
    for block in blocks:
        head = list(block[0])
        cells = [head, *([_text(row[name]) for name in head] for row in block)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines += ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip()
                  for line in cells]
        lines.append("")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)
