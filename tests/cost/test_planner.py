"""Plans: every spec is ranked, or rejected with its reason; quick estimates against close ones."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from ringcompile.axes import TIME
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.commands.plan import _rejections
from ringcompile.commands.transform import transform as transform_command
from ringcompile.compiler import transform
from ringcompile.cost import forks
from ringcompile.cost.estimate import Ask, Estimator, HasRanks, Model, on_line
from ringcompile.cost.figures import Figure
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.cost.layers import cut, find_stack
from ringcompile.cost.plans import BATCH, REFUSED, SLOW, Plan
from ringcompile.cost.rank import cost_of
from ringcompile.cost.scaling import with_batch
from ringcompile.cost.simulate import simulate
from ringcompile.cost.specs import (
    Variant,
    factorisations,
    variants,
)
from ringcompile.cost.timeline import How
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.pass_list import prepare
from ringcompile.planning import plans_for
from tests.cost.clusters import cluster, device, figure, table
from tests.cost.patterns import layers_of
from tests.support import some_fast

FIELDS = {"spec", "tps", "step_ms", "latency_ms", "bound", "memory_bytes", "fits", "why", "reason",
          "options"}


def small_cluster(num: int, **figures: Any) -> Cluster:
    data = copy.deepcopy(table(per_node=16))
    data["device"] = device(figures=figures)
    data["links"]["node"] |= {
        "startup": figure(5.0, "us"), "latency": figure(1.0, "us"),
        "bandwidth": figure(50.0, "GB/s"),
    }
    return cluster(**{k: data[k] for k in ("device", "links")}, per_node=16).sized(num)


@lru_cache
def dense(num_gpus: int = 4, batch: int = 1) -> list[Plan]:
    ask = Ask(num_gpus, small_cluster(num_gpus), 4096, batch)
    return plans_for("dense-4l-tiny", ask)


# -- plans ----------------------------------------------------------------------------------------


def test_every_spec_is_there_with_a_reason() -> None:
    plans = dense()
    specs = {str(plan.variant.mesh) for plan in plans if TIME not in plan.variant.mesh.names}
    # A model without experts has nothing for ep.
    assert specs == {str(mesh) for mesh in factorisations(4) if "ep" not in mesh.names}
    assert all(plan.why for plan in plans)
    fitting = [plan for plan in plans if plan.fits]
    assert fitting == plans[: len(fitting)]
    rates = [plan.tps or 0.0 for plan in fitting]
    assert rates == sorted(rates, reverse=True)
    assert len(fitting) > 10


def test_a_tied_head_is_no_second_weight() -> None:
    """Else ranks seem to hold less than the model, and `ep` to divide something."""
    plans = plans_for("gpt-tiny", Ask(2, small_cluster(2), 64, 1))
    assert plans
    assert not [plan for plan in plans if "ep" in plan.variant.mesh.names]


def test_half_a_sequence_at_a_time_is_a_plan_and_costs_what_its_program_does() -> None:
    (plan,) = [plan for plan in dense() if TIME in plan.variant.mesh.names]
    assert str(plan.variant) == "time=2,ring=4 --order zigzag"
    assert plan.fits
    assert plan.close
    made = transform(captured(), plan.variant.mesh, **plan.variant.choices(4096))
    found = simulate([cost_of(rank, 4096) for rank in made.ranks()], small_cluster(4))
    assert plan.seconds == pytest.approx(found.seconds, rel=0.05)
    assert plan.memory_bytes == pytest.approx(found.memory_bytes, rel=0.1)


def test_plans_are_the_same_however_many_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for processors in (1, 2):
        monkeypatch.setattr(forks, "_processors", lambda n=processors: n)
        found.append([plan.to_json() for plan in dense.__wrapped__(num_gpus=2)])
    assert found[0] == found[1]


def test_plans_as_json() -> None:
    rows = json.loads(json.dumps([plan.to_json() for plan in dense()]))
    for row in rows:
        assert row.keys() == FIELDS
        assert (row["tps"] is None) == (row["step_ms"] is None) == (not row["fits"])
        if row["fits"]:
            assert row["tps"] * row["step_ms"] / 1e3 == pytest.approx(4096)
            assert row["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("dp=4", "a batch of 1 does not divide over dp=4"),
        ("dp=2,tp=2", "a batch of 1 does not divide over dp=2"),
    ],
)
def test_reasons(spec: str, reason: str) -> None:
    (plan,) = [p for p in dense() if str(p.variant.mesh) == spec]
    assert (plan.fits, plan.tps, plan.why) == (False, None, reason)


def test_heads_and_layers_that_do_not_divide() -> None:
    """4 heads and 4 layers of dense-4l-tiny, on 5 devices."""
    reasons = {str(p.variant.mesh): p.why for p in dense(5) if not p.fits}
    assert reasons == {
        "pp=5": "4 layers are fewer than the 5 stages of pp=5",
        "tp=5": "tp=5 divides no weights of this model",
        "dp=5": "a batch of 1 does not divide over dp=5",
    }


def test_the_best_are_estimated_closely() -> None:
    best = [plan for plan in dense() if plan.fits][:4]
    assert all(plan.close for plan in best)


@pytest.mark.parametrize("spec", [
    "ring=4", "ulysses=4", "tp=4", "ring=2,tp=2", "ring=2,ulysses=2", "pp=2,tp=2", "pp=2,ring=2",
    "pp=4",
])
def test_quick_estimates_hold_against_close_ones(spec: str) -> None:
    estimator, _ = estimators()
    for variant in variants(Mesh.parse(spec), 1):
        quick, close = estimator.quick(variant, float("inf")), estimator.close(variant)
        assert quick.seconds == pytest.approx(close.seconds, rel=0.12), str(variant)
        assert quick.memory_bytes == pytest.approx(close.memory_bytes, rel=0.15), str(variant)


@pytest.mark.parametrize("spec", ["pp=2", "pp=2,tp=2", "pp=2,ring=2"])
def test_what_crosses_crosses_once(spec: str) -> None:
    """A stage of two layers, from one: its step takes as long as that of the whole program."""
    estimator, _ = estimators()
    variant = next(variants(Mesh.parse(spec), 1))
    close = estimator.close(variant)
    whole = transform(prepare(captured()), variant.mesh, order=variant.order, length=4096)
    costs = [cost_of(rank, 4096) for rank in whole.ranks()]
    found = simulate(costs, small_cluster(16), How(merged=True))
    assert close.latency == pytest.approx(found.seconds, rel=0.02)


def test_what_crosses_grows_with_the_batch() -> None:
    """A stage by itself against all of them, over a link that hidden states fill."""
    slow = small_cluster(2)
    node, rate = slow.links["node"], Figure(0.05, "GB/s", "assumed", "x", "2026")
    node = replace(node, figures={**node.figures, "bandwidth": rate})
    slow = replace(slow, links={"node": node})
    total = sum(weight.num_bytes for weight in captured().weights.values())
    variant = Variant(Mesh.parse("pp=2"))
    estimator = Estimator(Model(find_stack(captured()), total), Ask(2, slow, 4096, 4), compile_)
    quick, close = estimator.quick(variant, float("inf")), estimator.close(variant)
    assert close.path["communication"] > sum(close.path.values()) / 2
    assert quick.seconds == pytest.approx(close.seconds, rel=0.2)


@pytest.mark.parametrize(
    ("spec", "kinds"),
    some_fast(
        ["ring=2", "pp=2", "pp=4"], ["abab", "aabaab", "caaa", "ababa"],
        fast=lambda *case: case in (("ring=2", "aabaab"), ("pp=2", "caaa"), ("pp=4", "ababa")),
    ),
)
def test_layers_of_several_kinds(kinds: str, spec: str) -> None:
    """Quickly and closely, against the whole program; four stages are more than whole blocks."""
    whole = layers_of(kinds)
    stack, mesh = find_stack(whole), Mesh.parse(spec)
    assert stack is not None
    variant = Variant(mesh, order="contiguous")

    def of_blocks(variant: Variant, length: int) -> HasRanks:
        pp = variant.mesh.size("pp")
        return transform(prepare(cut(whole, stack, pp)), variant.mesh, order="contiguous",
                         length=length, stages=stack.starts(pp))

    total = sum(weight.num_bytes for weight in whole.weights.values())
    estimator = Estimator(Model(stack, total), Ask(4, small_cluster(4), 4096), of_blocks)
    costs = [cost_of(rank, 4096) for rank in transform(whole, mesh, order="contiguous",
                                                       length=4096).ranks()]
    many = simulate(costs, small_cluster(4), How(6, merged=True))
    expected = many.period if "pp" in spec else simulate(costs, small_cluster(4)).seconds
    for found in (estimator.quick(variant, float("inf")), estimator.close(variant)):
        # A stage of some of a block's layers is costed as so much of the block.
        assert found.seconds == pytest.approx(expected, rel=0.35)


def test_a_long_ring_from_short_ones() -> None:
    """Against the ring itself, one place of it by itself in both cases."""
    estimator, compile_ = estimators(32, 32768)
    variant = Variant(Mesh.parse("ring=32"), order="contiguous")
    found = estimator.quick(variant, float("inf"))
    assert not estimator.can_be_close(variant)
    alone = Estimator(Model(find_stack(captured()), 0, (32768, 32768)), estimator.ask, compile_)
    expected = alone.quick(variant, float("inf"))
    assert found.seconds == pytest.approx(expected.seconds, rel=0.05)


@lru_cache
def captured() -> Program:
    loaded = load_model("dense-4l-tiny", weights=False)
    return capture(loaded.module, loaded.args, loaded.kwargs)


@lru_cache
def prepared(layers: int) -> Program:
    stack = find_stack(captured())
    assert stack is not None
    return prepare(cut(captured(), stack, layers))


def compile_(variant: Variant, length: int) -> HasRanks:
    return transform(prepared(variant.mesh.size("pp")), variant.mesh, order=variant.order,
                     length=length, ring=variant.ring, tp_sequence=variant.tp_sequence)


def estimators(num: int = 4, length: int = 4096) -> tuple[Estimator, Any]:
    total = sum(weight.num_bytes for weight in captured().weights.values())
    hardware = small_cluster(16) if num <= 16 else cluster(per_node=64)
    ask = Ask(num, hardware, length)
    return Estimator(Model(find_stack(captured()), total), ask, compile_), compile_


def test_a_batch_is_planned_from_one_sequence() -> None:
    """As if its own sizes had been read off the program."""
    stack = find_stack(captured())
    assert stack is not None
    mesh = Mesh.parse("ring=2,ulysses=2")
    made = transform(cut(captured(), stack, 1), mesh, order="zigzag", length=4096)
    one, four = ([cost_of(rank, 4096, batch) for rank in made.ranks()] for batch in (1, 4))
    found = simulate([with_batch(cost, 4) for cost in one], small_cluster(4))
    expected = simulate(four, small_cluster(4))
    assert expected.seconds > 1.5 * simulate(one, small_cluster(4)).seconds
    assert found.seconds == pytest.approx(expected.seconds, rel=0.02)
    assert found.memory_bytes == pytest.approx(expected.memory_bytes, rel=0.02)


def test_a_batch_has_replicas_and_microbatches() -> None:
    plans = dense(4, 4)
    fitting = {str(p.variant) for p in plans if p.fits}
    assert "dp=4" in fitting
    assert any("--microbatches 2" in text for text in fitting)
    assert any("pp=2,dp=2" in text for text in fitting)


def test_capacity_modes_where_they_matter() -> None:
    ask = Ask(2, small_cluster(2), 4096)
    modes = {p.variant.capacity for p in plans_for("moe-4l-tiny", ask) if p.fits}
    assert modes == {"exact", "local"}
    assert {p.variant.capacity for p in dense() if p.fits} == {"exact"}


# -- what is not possible -------------------------------------------------------------------------


def test_nothing_fits() -> None:
    ask = Ask(2, small_cluster(2, memory=figure(1.0, "MB"), reserved=figure(0.0, "MB")), 4096)
    with pytest.raises(RingCompileError, match=r"nothing fits|no parallel spec") as error:
        plans_for("dense-4l-tiny", ask)
    assert "GB" in str(error.value)


def test_what_does_not_fit_is_rejected_with_its_bytes() -> None:
    """Weights of 0.8 MB; a rank of tp=2 has half of them, but all hidden states."""
    ask = Ask(2, small_cluster(2, memory=figure(9.0, "MB"), reserved=figure(0.0, "MB")), 4096)
    plans = plans_for("dense-4l-tiny", ask)
    reasons = [p.why for p in plans if not p.fits and p.memory_bytes]
    assert reasons
    assert all(why.startswith("a rank holds 0.0") for why in reasons)
    assert any(p.fits for p in plans)


def test_lines_through_estimates() -> None:
    estimator, _ = estimators()
    one = estimator.close(Variant(Mesh.parse("tp=2")))
    other = estimator.close(Variant(Mesh.parse("tp=4")))
    assert on_line(one, other, 0).seconds == pytest.approx(one.seconds)
    assert on_line(one, other, 1).memory_bytes == other.memory_bytes
    assert on_line(one, other, 2).seconds == pytest.approx(2 * other.seconds - one.seconds)


@pytest.mark.slow
@pytest.mark.parametrize(("num", "name", "limit"), [(16, "h100x16", 20), (1024, "h100x8x2", 60)])
def test_plans_are_made_in_time(num: int, name: str, limit: float) -> None:
    """CPU seconds of one thread, the model's capture included."""
    started = time.process_time()
    plans = plans_for("dense-4l", Ask(num, load_cluster(name).sized(num), 16384))
    assert time.process_time() - started < limit
    assert all(plan.why for plan in plans)


# -- words ----------------------------------------------------------------------------------------


def test_rejections_by_time_name_the_best_plan_that_there_is() -> None:
    plans = dense()
    best = {
        mode: min((p.seconds for p in plans if p.seconds and p.variant.capacity == mode),
                  default=plans[0].seconds) for mode in ("exact", "local")
    }
    slow = [plan for plan in plans if plan.reason == SLOW]
    assert slow
    for plan in slow:
        least = best[plan.variant.capacity]
        assert plan.why.endswith(f", the best plan takes {least * 1e3:.4g} ms")
        assert plan.least is None or plan.least >= least


def test_every_spec_is_what_transform_takes() -> None:
    every = [*dense(), *(Plan(v, 1.0, 1.0, 1.0, "", 1, True, "") for v in (
        Variant(Mesh.parse("ring=2,tp=2"), "zigzag", "gather", True, "local", 4, "halves"),))]
    for plan in every:
        words = ["dense-4l-tiny", "-o", "out", "--parallel", *str(plan.variant).split()]
        given = transform_command.make_context("transform", words).params
        assert given["parallel"] == str(plan.variant.mesh)
        chosen = given["overlap"], given["order"], given["tp_sequence"], given["capacity"]
        variant = plan.variant
        assert chosen == (variant.overlap, variant.order, variant.tp_sequence, variant.capacity)
        assert given["microbatches"] == variant.options.get("microbatches")


def test_rejections_are_folded_by_reason() -> None:
    def refused(spec: str, why: str, reason: str) -> Plan:
        return replace(dense()[0], variant=Variant(Mesh.parse(spec)), tps=None, why=why,
                       reason=reason)

    lines = list(_rejections([
        refused("tp=2", "6 heads over tp=4", REFUSED),
        refused("tp=8", "6 heads over tp=8", REFUSED),
        refused("dp=2", "a", BATCH), refused("dp=4", "b", BATCH), refused("dp=8", "c", BATCH),
        refused("pp=8", "another reason", REFUSED),
    ]))
    assert lines == [
        "rejected 3, the batch does not divide over dp (dp=2: a; dp=4: b; and 1 more)",
        "rejected 2, refused by the compiler (tp=2: 6 heads over tp=4; tp=8: 6 heads over tp=8)",
        "rejected 1, refused by the compiler (pp=8: another reason)",
    ]
