"""`simulate`, `plan`, `bench`, `calibrate` as a user has them: output, exit codes, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from ringcompile.calibration import usual
from ringcompile.cli import cli
from ringcompile.cost.hardware import load_cluster
from ringcompile.errors import RingCompileError
from tests.cost.clusters import figure, table
from tests.test_cli import ringcompile

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("zoo_captured_once")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


def told(*args: str) -> Any:
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output + str(result.exception)
    return json.loads(result.stdout)


def refused(*args: str) -> str:
    result = invoke(*args)
    assert isinstance(result.exception, RingCompileError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    out = str(tmp_path_factory.mktemp("made") / "ring")
    assert invoke("transform", "dense-4l-tiny", "-o", out, "--parallel", "ring=2").exit_code == 0
    return out


# -- simulate -------------------------------------------------------------------------------------


def test_simulate_as_json(ring: str) -> None:
    found = told("simulate", ring, "--cluster", "h100x16", "--seq", "4096")
    assert found["tokens"] == 4096
    assert found["tps"] * found["step_ms"] / 1e3 == pytest.approx(4096)
    assert found["fits"]
    assert sum(found["path_ms"].values()) == pytest.approx(found["latency_ms"])
    assert [row["rank"] for row in found["ranks"]] == [0, 1]
    for row in found["ranks"]:
        spent = row["compute_ms"] + row["exposed_ms"] + row["bubble_ms"]
        assert spent == pytest.approx(found["latency_ms"])
        # Two thousand tokens' keys and values of 4 layers, or half of them.
        assert row["bytes_sent"] in (2048 * 2 * 64 * 4 * 4, 1024 * 2 * 64 * 4 * 4)


def test_simulate_prints_a_table_and_a_trace(ring: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = invoke("simulate", ring, "--cluster", "cpu", "--seq", "256", "--trace", str(trace))
    assert result.exit_code == 0
    assert "exposed communication" in result.stdout
    assert "longest path:" in result.stdout
    rows = json.loads(trace.read_text())["traceEvents"]
    ranks = [row["args"]["name"] for row in rows if row["name"] == "process_name"]
    assert ranks == ["rank 0", "rank 1"]


def test_an_eager_host_takes_longer(ring: str) -> None:
    graphs, eager = (
        told("simulate", ring, "--cluster", "h100x16", "--seq", "256", *more)["step_ms"]
        for more in ((), ("--eager",))
    )
    assert eager > 1.5 * graphs


def test_replicas_and_microbatches_are_counted(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert invoke("transform", "dense-4l-tiny", "-o", out, "--parallel", "dp=2,pp=2",
                  "--batch", "3").exit_code == 0
    found = told("simulate", out, "--cluster", "h100x16", "--seq", "128", "--batch", "3")
    assert found["tokens"] == 128 * 3 * 2
    found = told("bench", out, "--seq", "16", "--batch", "12", "--steps", "1", "--warm-up", "0")
    assert found["tokens"] == 16 * 12
    hidden = 16 * 64 * 4  # bytes of a sequence between stages; each replica has 6 of them
    assert [row["bytes_sent"] for row in found["ranks"]] == [6 * hidden, 0] * 2
    assert found["predicted"] == {
        "cluster": None, "why_not": "cluster 'cpu' has 1 x 2 devices, 4 are asked for (its table "
        "has no link between nodes; name another cluster)"}
    message = refused("bench", out, "--batch", "1")
    assert "a batch of 1 is too small for dp=2" in message


def test_simulate_refuses(ring: str, tmp_path: Path) -> None:
    assert "unknown cluster 'h999'" in refused("simulate", ring, "--cluster", "h999")
    fixed = str(tmp_path / "fixed")
    made = invoke("transform", "dense-4l-tiny", "-o", fixed, "--parallel", "ring=2", "--seq", "64")
    assert made.exit_code == 0, made.exception
    assert "is for 64 tokens, --seq asks for 65" in refused(
        "simulate", fixed, "--cluster", "cpu", "--seq", "65")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**table(), "nodes": 0}))
    message = refused("simulate", ring, "--cluster", str(file))
    assert "mine.json: nodes: 0 is not a number" in message
    assert "cannot write" in refused(
        "simulate", ring, "--cluster", "cpu", "--trace", str(tmp_path / "no" / "trace"))


# -- plan -----------------------------------------------------------------------------------------


def test_plan_as_json_is_a_list_of_specs() -> None:
    rows = told("plan", "dense-4l-tiny", "--gpus", "2", "--cluster", "h100x16", "--seq", "4096")
    specs = {"ring=2", "time=2,ring=2", "ulysses=2", "tp=2", "pp=2", "dp=2"}
    assert {row["spec"] for row in rows} == specs
    for row in rows:
        assert {"spec", "tps", "step_ms", "bound", "memory_bytes", "fits", "why"} <= row.keys()
        assert row["why"]


def test_plan_costs_fused_groups_unless_told_otherwise() -> None:
    words = ("plan", "dense-4l-tiny", "--gpus", "2", "--cluster", "h100x16", "--seq", "4096")
    times = [
        {row["spec"]: row["step_ms"] for row in rows if row["fits"]}
        for rows in (told(*words), told(*words, "--no-fuse"))
    ]
    assert times[0].keys() == times[1].keys()
    assert all(times[0][spec] < times[1][spec] for spec in times[0])


def test_plan_prints_the_best_and_the_rejected() -> None:
    result = invoke("plan", "dense-4l-tiny", "--gpus", "2", "--cluster", "cpu", "--top", "2")
    assert result.exit_code == 0
    assert "slower ones; --json has all" in result.stdout
    assert ("rejected 1, the batch does not divide over dp (dp=2: a batch of 1 does not divide "
            "over dp=2)\n") in result.stdout


class Pair(nn.Module):
    """Its code works on two sequences, and no other number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x
        return torch.stack([first + second, first - second])


def pair() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Pair(), (torch.randn(2, 24, 8),)


def test_plan_refuses(tmp_path: Path) -> None:
    message = refused("plan", "tests.test_cost_commands:pair", "--gpus", "2", "--cluster", "cpu")
    assert "is fixed at 2, plans are made from one sequence" in message
    assert "unknown cluster" in refused("plan", "dense-4l-tiny", "--gpus", "2", "--cluster", "x")
    assert "2 x 8 devices, 12 are asked for" in refused(
        "plan", "dense-4l-tiny", "--gpus", "12", "--cluster", "h100x8x2")
    file, data = tmp_path / "mine.json", table()
    data["device"]["figures"] |= {"memory": figure(1.0, "MB"), "reserved": figure(0.9, "MB")}
    file.write_text(json.dumps(data))
    message = refused("plan", "dense-4l-tiny", "--gpus", "2", "--cluster", str(file))
    assert "fits" in message or "possible" in message
    assert "room" in message


# -- overlap --------------------------------------------------------------------------------------


def test_halves_of_a_batch_are_compiled_and_verified(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    result = invoke("transform", "dense-4l-tiny", "-o", out, "--parallel", "ring=2", "--batch", "2",
                    "--overlap", "halves")
    assert result.exit_code == 0, result.exception
    assert invoke("verify", out, "--numerics").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--overlap", "schedule", "--overlap-on", "x"], "unknown cluster 'x'"),
        (["--parallel", "ring=4", "--overlap", "schedule", "--overlap-on", "cpu"],
         "cluster 'cpu' has 1 x 2 devices, 4 are asked for"),
    ],
)
def test_overlap_refuses(args: list[str], message: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    given = ("transform", "dense-4l-tiny", "-o", out, "--parallel", "ring=2")
    assert message in refused(*given, *args)


def test_halves_of_an_odd_batch_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert invoke("transform", "dense-4l-tiny", "-o", out, "--parallel", "ring=2", "--overlap",
                  "halves").exit_code == 0
    assert "batch of 3 cannot be split into 2 equal parts" in refused("bench", out, "--batch", "3")


# -- on processes ---------------------------------------------------------------------------------


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ringcompile", *args], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False, timeout=240,
    )


def test_bench_measures_what_simulate_predicts(ring: str) -> None:
    found = told("bench", ring, "--seq", "64", "--steps", "3", "--warm-up", "1")
    assert found["steps"] == 3
    assert found["tps"] == pytest.approx(64 / found["step_ms"] * 1e3)
    assert found["prefill_tps"] == found["tps"]
    assert list(found["percentiles_ms"]) == ["p10", "p50", "p90", "p99"]
    assert found["percentiles_ms"]["p50"] == pytest.approx(found["step_ms"])
    sent = [row["bytes_sent"] for row in found["ranks"]]
    assert sent == found["predicted"]["bytes_sent"]
    assert found["predicted"]["tps"] > 0
    assert found["environment"]["backend"] == "gloo"


def test_calibrate_writes_a_table_that_simulate_takes(ring: str, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    done = run("calibrate", "--quick", "-o", str(file))
    assert done.returncode == 0, done.stderr
    found = load_cluster(str(file))
    assert found.per_node == 2
    measured = {k for k, f in found.device.figures.items() if f.basis == "measured"}
    assert {"matmul.float32", "attention.float32", "stream", "launch", "issue"} <= measured
    assert "ringcompile calibrate on 1 thread of" in found.device.figures["launch"].source
    links = found.links["node"].figures.keys()
    assert {"startup", "bandwidth", "all_reduce", "interference"} <= links
    assert told("simulate", ring, "--cluster", str(file), "--seq", "64")["tps"] > 0


@pytest.mark.slow
def test_what_is_not_measured_is_the_other_tables(tmp_path: Path) -> None:
    based = tmp_path / "based.json"
    done = run("calibrate", "--quick", "--ranks", "1", "--base", "h100x16", "-o", str(based))
    assert done.returncode == 0, done.stderr
    mixed = load_cluster(str(based))
    assert (mixed.name, mixed.num_devices) == ("h100x16", 16)
    own = load_cluster("h100x16").device.figures
    assert mixed.device.figures["matmul.float16"] == own["matmul.float16"]  # not measured here
    assert mixed.device.figures["peak.float16"].basis == "datasheet"
    assert mixed.device.figures["launch"].basis == "measured"


def test_of_passes_the_median_counts() -> None:
    passes = [
        {"launch": {"value": seconds, "unit": "us"}, "rate": {"value": rates, "unit": "GB/s"}}
        for seconds, rates in ((3.0, [1.0, 9.0]), (1.0, [4.0, 2.0]), (2.0, [3.0, 1.0]))
    ]
    found = {key: figure["value"] for key, figure in usual(passes).items()}
    assert found == {"launch": 2.0, "rate": [3.0, 2.0]}


def test_bench_and_calibrate_refuse(ring: str, tmp_path: Path) -> None:
    done = ringcompile("bench", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    if not os.path.exists("/dev/nvidia0"):
        done = ringcompile("calibrate", "--device", "cuda")
        assert done.returncode == 1
        assert "there is no CUDA device" in done.stderr
