"""`benchmarks.cluster`: rehearsed over gloo on processes of this machine, with tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cluster.page import page, right
from benchmarks.cluster.steps import overlap
from ringcompile.cost.hardware import load_cluster
from ringcompile.traces.measured import RankTrace

ROOT = Path(__file__).parents[1]


def rehearse(out: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "-m", "benchmarks.cluster", "--dry-run", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("processes", "options", "links", "models"),
    [
        pytest.param(2, ("--model", "dense-4l-tiny", "--length", "16", "--rounds", "1"),
                     {"node"}, ["dense-4l-tiny"], id="two-ranks", marks=pytest.mark.slow),
        pytest.param(4, (), {"node"}, ["dense-4l-tiny", "moe-4l-tiny"],
                     id="four-ranks", marks=pytest.mark.slow),
        pytest.param(4, ("--per-node", "2", "--model", "moe-4l-tiny"), {"node", "between"},
                     ["moe-4l-tiny"], id="two-nodes-of-two", marks=pytest.mark.slow),
    ],
)
def test_one_command_ends_with_its_json_and_its_page(
    processes: int, options: tuple[str, ...], links: set[str], models: list[str], tmp_path: Path
) -> None:
    done = rehearse(tmp_path, processes, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "cluster.json").read_text())
    assert [row["model"] for row in found["numbers"]] == [m for m in models for _ in range(2)]
    assert all(row["max_error"] < 1e-5 and right(row) for row in found["numbers"])
    methods = ["TP x PP", "RA+SP", "best plan"]
    assert [(r["model"], r["method"]) for r in found["steps"]] == [
        (model, method) for model in models for method in methods
    ]
    for row in found["steps"]:
        assert row["measured_ms"] > 0
        assert row["simulated_ms"] > 0
        assert row["transfers_ms"] > 0 or "dp" in row["parallel"]
        assert 0 <= row["hidden"] <= 1
    text = (tmp_path / "cluster.md").read_text()
    assert text == page(found)
    assert text.count("| right |") == len(found["numbers"])
    cluster = load_cluster(tmp_path / "table.json")
    assert set(cluster.links) == links
    assert cluster.num_devices == processes


def test_an_odd_job_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cluster", "--dry-run", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: the job has 1 rank, the paper's methods need an even number\n"
        "  hint: start it with torchrun --nproc-per-node 4\n"
    )
    assert not (tmp_path / "out").exists()


def row(**changed: Any) -> dict[str, Any]:
    return {"model": "dense-4l", "method": "RA+SP", "parallel": "ring=4", "tokens": 1000,
            "max_error": 1e-3, "rms_error": 1e-3, "tokens_off": 0, **changed}


def test_numbers_that_are_wrong_are_called_wrong() -> None:
    assert right(row())
    assert not right(row(tokens_off=1))
    assert right(row(model="moe-4l", tokens_off=10))
    assert not right(row(model="moe-4l", tokens_off=11))
    texts = dict.fromkeys(("device", "backend", "torch", "date"), "")
    about: dict[str, Any] = {"nodes": 1, "per_node": 4, **texts}
    text = page({"environment": about, "dry": False, "numbers": [row(tokens_off=7)]})
    assert "| 7 | WRONG |" in text
    assert text.count("Not measured.") == 2


def test_what_compute_hides_of_transfers() -> None:
    slices = [
        ("ring", "a", "communication", 0.0, 4.0, 0), ("tp", "b", "communication", 3.0, 6.0, 0),
        ("compute", "x", "op", 1.0, 2.0, 0), ("compute", "y", "op", 3.5, 5.5, 0),
        ("compute", "w", "wait", 5.5, 6.0, 0), ("compute", "z", "op", 7.0, 9.0, 0),
    ]
    found = overlap(RankTrace(0, slices, [], {}, 0.0))
    assert found == {"transfers_ms": 6000.0, "waits_ms": 500.0, "hidden": 0.5}
    assert overlap(RankTrace(0, slices[2:4], [], {}, 0.0))["hidden"] == 1.0
