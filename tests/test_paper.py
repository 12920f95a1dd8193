"""docs/paper.md says what the recorded rows say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.paper_page import NUM_GPUS, page
from ringcompile.cost.hardware import load_cluster

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_rows() -> None:
    """A figure that somebody typed in, or rows without a new page, would differ."""
    found = json.loads((ROOT / "benchmarks" / "results" / "paper-table.json").read_text())
    cluster = load_cluster(found["cluster"]).sized(NUM_GPUS)
    made = page(found["rows"], found["long"], cluster, "paper.png")
    assert (ROOT / "docs" / "paper.md").read_text() == made
