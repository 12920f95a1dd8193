"""What generating costs: by the model of costs, for all specs and for an artifact, and measured."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import ringcompile as rc
from ringcompile.cli import cli
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.kernels import Kernel
from ringcompile.cost.rank import RankCost, cost_of
from ringcompile.generation_plans import GenerationRequest, generation_plans, simulate_request
from ringcompile.ir.program import Program
from ringcompile.latency import Latency, request, summary
from tests.communication.count import captured as experts
from tests.generate.models import CAPACITY, HEADS, Learned, Rotary, cached, captured, ids


@cache
def program(dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> Program:
    """In a type that tables of hardware know; what layers have in common is outside of them."""
    return rc.capture(Learned(layers=layers).to(dtype).eval(), (ids(12),))


def attention(cost: RankCost) -> list[Kernel]:
    return [kernel for step in cost.steps if step.op == "cached_attention"
            for kernel in step.kernels]


def test_cached_attention_follows_the_context() -> None:
    """Keys and values of all slots in use, once for all query heads; queries and results."""
    grouped = rc.transform(captured(lambda: Rotary(groups=2))[1], "ring=2", cache=CAPACITY)
    assert grouped.carried is not None
    rank = grouped.carried.rank(0)
    row = 2 * (24 // HEADS) * 8  # a key and a value
    for context in (2, 10, 80):
        cost = cost_of(rank, 1, 1, context)
        assert [(k.kind, k.num_bytes) for k in attention(cost)] == [
            ("attention_cached", row * (HEADS + 2 * context // 2))
        ] * 2
        slots = 80 // 2 + 33 + 1
        assert cost.cache_bytes == 2 * 2 * slots * row  # layers, KV heads
        assert cost.peak_bytes > cost.weight_bytes + cost.cache_bytes
    first, later = cost_of(rank, 8, 1, 8), cost_of(rank, 8, 1, 80)
    assert {k.kind for k in attention(first)} == {"attention_masked"}  # of ring, each has a half
    assert attention(later)[0].columns == 40


def test_an_artifact_on_a_cluster(tmp_path: Path) -> None:
    rc.transform(program(), "ring=2", cache=CAPACITY).save(tmp_path / "out")

    def told(*options: str) -> dict[str, Any]:
        found = CliRunner().invoke(cli, [
            "simulate", str(tmp_path / "out"), "--cluster", "h100x16", "--new-tokens", "16",
            *options, "--json"
        ])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    short, long, many = (told("--context", "8"), told("--context", "64"),
                         told("--context", "64", "--batch", "8"))
    assert short["ttft_ms"] <= long["ttft_ms"]
    assert long["ttft_ms"] > long["tpot_ms"] > 0
    assert long["tps"] == pytest.approx(1e3 / long["tpot_ms"])
    assert many["cache_bytes"] == 8 * long["cache_bytes"]
    assert many["tps"] > long["tps"]
    plain = CliRunner().invoke(cli, ["simulate", str(tmp_path / "out"), "--cluster", "h100x16",
                                     "--new-tokens", "16", "--context", "64"])
    assert "TTFT " in plain.stdout
    assert "TPOT " in plain.stdout
    found = CliRunner().invoke(cli, ["simulate", str(tmp_path / "out"), "--cluster", "h100x16",
                                     "--new-tokens", "18", "--context", "64"])
    assert str(found.exception) == (
        "error: 64 tokens and 18 new ones do not fit the cache, which is for 80\n"
        "  hint: name a shorter --context, or compile with a larger --cache"
    )


def test_plans_say_what_each_is_best_for() -> None:
    cluster, asked = load_cluster("h100x16").sized(4), GenerationRequest(64, 16, 2)
    plans = generation_plans(program(), cluster, asked)
    fitting = [plan for plan in plans if plan.fits]
    assert "ring=4" in {str(plan.mesh) for plan in fitting}
    assert [plan.tpot for plan in fitting] == sorted(plan.tpot or 0 for plan in fitting)
    assert "next token soonest" in fitting[0].serves
    best = {what for plan in plans for what in plan.serves} - {"frontier"}
    assert best == {"first token soonest", "next token soonest", "most memory left"}
    soonest = next(plan for plan in plans if "first token soonest" in plan.serves)
    assert soonest.ttft == min(plan.ttft or 0 for plan in fitting)
    refused = {str(plan.mesh): plan.why for plan in plans if not plan.fits}
    assert refused["dp=4"] == "a batch of 2 does not divide over dp=4"


def test_a_plan_costs_what_its_artifact_does() -> None:
    """Blocks are repeated by the planner; the artifact has all layers."""
    cluster, asked = load_cluster("h100x16").sized(2), GenerationRequest(64, 16)
    deep = program(layers=6)
    for spec in ("tp=2", "ring=2", "pp=2"):
        (plan,) = generation_plans(deep, cluster, asked, specs=[spec])
        found = simulate_request(rc.transform(deep, spec, cache=80), cluster, asked)
        assert plan.tpot == pytest.approx(found.step.seconds, rel=0.15), spec
        assert plan.ttft == pytest.approx(found.ttft, rel=0.15), spec
        assert plan.memory_bytes == pytest.approx(found.memory_bytes, rel=0.15), spec


def test_experts_are_divided_in_plans_too() -> None:
    """Of a model without experts no plan names `ep`."""
    cluster, asked = load_cluster("h100x16").sized(2), GenerationRequest(64, 16)
    plans = {str(plan.mesh): plan for plan in generation_plans(experts("experts of 4"), cluster,
                                                               asked)}
    assert set(plans) == {"dp=2", "pp=2", "ring=2", "ep=2", "tp=2"}
    made = rc.transform(experts("experts of 4"), "ep=2", cache=80)
    found = simulate_request(made, cluster, asked)
    assert plans["ep=2"].tpot == pytest.approx(found.step.seconds, rel=0.15)
    assert not any("ep=" in str(plan.mesh) for plan in generation_plans(program(), cluster, asked))


def test_what_is_measured_of_a_request() -> None:
    made = Latency((0.5, 0.6, 0.8, 1.0), batch=2)
    assert made.ttft == 0.5
    assert made.tpot == pytest.approx(0.5 / 3)
    assert made.itl == pytest.approx([0.1, 0.2, 0.2])
    assert made.tokens_per_second == 8.0
    with rc.Session(cached(Learned, "ring=2")[1]) as session:
        found = [request(session, ids(9), 8) for _ in range(2)]
    assert [len(one.times) for one in found] == [8, 8]
    told = summary(found)
    assert told["itl_p50_ms"] <= told["itl_p99_ms"]
    assert told["ttft_ms"] < sum(one.times[-1] for one in found) * 1e3


def test_bench(tmp_path: Path) -> None:
    rc.transform(program(torch.float32), "ring=2", cache=CAPACITY).save(tmp_path / "out")
    found = CliRunner().invoke(cli, ["bench", str(tmp_path / "out"), "--new-tokens", "4",
                                     "--context", "9", "--steps", "2", "--warm-up", "0", "--json"])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert {"ttft_ms", "tpot_ms", "itl_p50_ms", "itl_p99_ms", "tps"} <= told.keys()
    assert told["predicted"]["tpot_ms"] > 0
    one = CliRunner().invoke(cli, ["bench", str(tmp_path / "out"), "--new-tokens", "1"])
    assert str(one.exception) == "error: --new-tokens 1: TPOT needs two tokens at least"
    for command in (["bench"], ["simulate", "--cluster", "h100x16"]):
        wrong = CliRunner().invoke(cli, [*command, str(tmp_path / "out"), "--context", "9"])
        assert wrong.exit_code == 2
