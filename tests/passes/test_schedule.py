"""Reordered programs and halves of a batch: the same numbers, the same messages, more overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.node_times import node_times
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import COLLECTIVES, SHIFT, WAIT, bytes_sent
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.passes.rank.schedule import Schedule
from tests.support import TOLERANCE, difference, run, some_fast, zoo_program

LENGTH = 48
TIMED = Schedule(node_times(load_cluster("h100x16"), LENGTH))
SPECS = ["ring=4", "ulysses=2", "tp=2", "pp=2", "ring=2,ulysses=2", "ring=2,tp=2", "pp=2,ring=2"]


def captured(name: str, batch: int = 1) -> Program:
    return zoo_program(name, batch=batch, sequence=24)


def compare(parallel: ParallelProgram, name: str, batch: int) -> None:
    """Ranks fit together, and give what the model gives."""
    loaded = load_model(name, batch=batch)
    with torch.no_grad():
        expected = loaded.module(*loaded.args)
    assert difference(run(parallel, loaded.args).outputs, expected) <= TOLERANCE


def exchanged(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes
            if str(n.target) == SHIFT or str(n.target) in COLLECTIVES]


@pytest.mark.parametrize("schedule", [Schedule(), TIMED], ids=["plain", "timed"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_numbers_stay(spec: str, schedule: Schedule) -> None:
    compare(transform(captured("dense-4l-tiny"), spec, schedule=schedule), "dense-4l-tiny", 1)


@pytest.mark.parametrize("name", some_fast(
    ["moe-4l-tiny", "llama-tiny", "bert-tiny"], fast=lambda name: name == "bert-tiny"))
def test_the_numbers_of_other_models_stay(name: str) -> None:
    compare(transform(captured(name), "ring=2", schedule=TIMED), name, 1)


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_added_or_left_out(spec: str) -> None:
    before, after = (transform(captured("dense-4l-tiny"), spec, schedule=s) for s in (None, TIMED))
    for one, other in zip(before.ranks(), after.ranks(), strict=True):
        assert exchanged(one) == exchanged(other)
        assert bytes_sent(one) == bytes_sent(other)
        assert sorted(map(str, one.graph.nodes)) == sorted(map(str, other.graph.nodes))


def place(program: Program, target: str, index: int = 0) -> int:
    found = [i for i, n in enumerate(program.graph.nodes) if str(n.target) == target]
    return found[index]


def test_keys_and_values_leave_before_the_query_is_made() -> None:
    before, after = (
        transform(captured("dense-4l-tiny"), "ring=4", schedule=s).rank(1) for s in (None, TIMED)
    )
    linear = "aten.linear.default"
    assert [place(p, linear, 2) < place(p, SHIFT) for p in (before, after)] == [True, False]
    assert place(after, linear, 1) < place(after, SHIFT) < place(after, linear, 2)


def test_waits_come_late_where_no_times_are_known() -> None:
    """All that does not need a transfer stands before its wait."""
    program = transform(captured("dense-4l-tiny"), "ring=2", schedule=Schedule()).rank(0)
    nodes = list(program.graph.nodes)
    wait = next(n for n in nodes if str(n.target) == WAIT)
    needs: set[object] = set()
    for node in nodes:
        if node is wait or needs & set(node.all_input_nodes):
            needs.add(node)
    behind = nodes[nodes.index(wait) + 1 :]
    first_free = next(n for n in behind if n.op == "call_function")
    assert first_free in needs


@pytest.mark.parametrize("spec", ["ring=4", "ring=2,ulysses=2"])
def test_a_schedule_is_not_slower(spec: str) -> None:
    cluster, name = load_cluster("h100x16"), "dense-4l-small"
    length = 4096
    timed = Schedule(node_times(cluster, length))
    seconds = []
    for schedule in (None, timed):
        parallel = transform(captured(name), spec, schedule=schedule)
        costs = [cost_of(program, length) for program in parallel.ranks()]
        seconds.append(simulate(costs, cluster).seconds)
    assert seconds[1] <= seconds[0] * 1.001


def under_way(program: Program) -> int:
    """How many transfers of one attention are under way at most."""
    now, most = Counter[str](), 0
    for node in program.graph.nodes:
        if str(node.target) == SHIFT and node.kwargs["source"] is not None:
            now[node.kwargs["of"]] += 1
            most = max(most, *now.values())
        if str(node.target) == WAIT and node.args[0].kwargs["source"] is not None:
            now[node.args[0].kwargs["of"]] -= 1
    return most


def test_more_transfers_are_under_way_where_that_hides_them() -> None:
    """A slow link has work before the attention begins; a fast one needs no more than two.

    While queries are projected, a tenth of a millisecond, three of the slow transfers are done.
    """
    def after(slower: float) -> list[Program]:
        def times(program: Program) -> dict[str, tuple[float, float]]:
            known = node_times(load_cluster("h100x16"), LENGTH)(program)
            return {
                name: (1e-4 if name.startswith("linear") else 1e-6, slower if sent else 0.0)
                for name, (_, sent) in known.items()
            }

        made = transform(captured("dense-4l-tiny"), "ring=8", schedule=Schedule(times))
        made.verify()
        return made.ranks()

    for slower, most in ((1e-7, 2), (3e-5, 4)):
        for program in after(slower):
            assert under_way(program) == most
            said = {n.meta.get("why") for n in program.graph.nodes if str(n.target) == SHIFT}
            assert said == {f"at most {most} of them under way"}


# -- pieces of a sequence -------------------------------------------------------------------------


def hidden_seconds(parallel: ParallelProgram, rank: int, length: int) -> dict[str, float]:
    """By layer: how long keys of piece 0 travel there while piece 1 is in the layer before.

    Only nodes with the name of their piece count, so attention of piece 1 comes on top.
    """
    program = parallel.rank(rank)
    of = {node.name: str(node.kwargs["of"]) for node in program.graph.nodes
          if str(node.target) == SHIFT}
    layer = {node.name: node.meta["loc"].layer.partition(".attention")[0]
             for node in program.graph.nodes if "loc" in node.meta}
    found = simulate(
        [cost_of(x, length) for x in parallel.ranks()], load_cluster("h100x16")).timeline
    late = [(layer[event.name], found.start(i), found.ends[i])
            for i, event in enumerate(found.events)
            if event.rank == rank and event.stream == "compute" and event.name.endswith("_t1")]
    hidden = dict.fromkeys((f"blocks.{i}" for i in range(1, 4)), 0.0)
    for transfer in found.transfers:
        if transfer.rank != rank or not of[transfer.name].endswith("_t0"):
            continue
        here, begin, end = layer[transfer.name], found.ends[transfer.begin], found.ends[
            transfer.done]
        for there, start, stop in late:
            if here in hidden and there.startswith(f"blocks.{int(here[-1]) - 1}"):
                hidden[here] += max(0.0, min(end, stop) - max(begin, start))
    return hidden


def test_keys_of_a_pieces_next_layer_travel_while_the_other_piece_is_computed() -> None:
    length = 2048
    timed = Schedule(node_times(load_cluster("h100x16"), length))
    scheduled, plain = (
        transform(captured("dense-4l-small"), "ring=4,time=2", order="contiguous", schedule=how)
        for how in (timed, None)
    )
    hidden = hidden_seconds(scheduled, 1, length)
    assert len(hidden) == 3
    assert min(hidden.values()) > 5e-6, hidden
    assert max(hidden_seconds(plain, 1, length).values()) == 0.0  # in the order of the graph
    costs = [[cost_of(x, length) for x in p.ranks()] for p in (plain, scheduled)]
    exposed = [simulate(each, load_cluster("h100x16")).exposed_seconds for each in costs]
    assert exposed[1] < 0.5 * exposed[0]


# -- halves of a batch ----------------------------------------------------------------------------


HALVED = ("ring=4", "tp=2", "ulysses=2", "ring=2,tp=2", "pp=2,ring=2")


def halves(name: str, spec: str, **options: Any) -> ParallelProgram:
    return transform(captured(name, 2), f"{spec},halves=2", **options)


@pytest.mark.parametrize(
    ("spec", "schedule"),
    [
        *(pytest.param(spec, None, id=f"{spec}-as-it-is",
                       marks=pytest.mark.slow if spec == "ring=4" else ()) for spec in HALVED),
        *(pytest.param(spec, TIMED, id=f"{spec}-scheduled",
                       marks=pytest.mark.slow if spec != "ring=4" else ()) for spec in HALVED),
    ],
)
def test_halves_give_what_the_batch_gives(spec: str, schedule: Schedule | None) -> None:
    compare(halves("dense-4l-tiny", spec, schedule=schedule), "dense-4l-tiny", 2)


@pytest.mark.parametrize("name", some_fast(
    ["llama-tiny", "gpt-tiny", "bert-tiny"], fast=lambda name: name == "llama-tiny"))
def test_halves_of_other_models(name: str) -> None:
    compare(halves(name, "ring=2", schedule=TIMED), name, 2)


def test_halves_take_turns() -> None:
    """Each attention's transfers of one half, then of the other, then the next attention's."""
    for rank in range(4):
        program = halves("dense-4l-tiny", "ring=4", schedule=TIMED).rank(rank)
        order = [str(n.kwargs["of"]) for n in program.graph.nodes if str(n.target) == SHIFT]
        turns = [name.split("_")[-1] for name in dict.fromkeys(order)]
        assert turns == ["half0", "half1"] * 4
        assert order == sorted(order, key=list(dict.fromkeys(order)).index)


def test_what_does_not_depend_on_the_batch_is_computed_once() -> None:
    alone = transform(captured("dense-4l-tiny"), "ring=2").rank(0)
    both = halves("dense-4l-tiny", "ring=2").rank(0)
    for name in ("aten.cos.default", "ringcompile.positions.default"):
        assert [sum(str(n.target) == name for n in p.graph.nodes) for p in (alone, both)] == [1, 1]


def test_one_half_hides_the_other_halfs_transfers() -> None:
    """On a link that takes as long as the compute, a schedule exposes less."""
    cluster, length = load_cluster("h100x16"), 2048
    timed = Schedule(node_times(cluster, length))
    exposed = []
    for schedule in (None, timed):
        parallel = halves("dense-4l-small", "ring=4", schedule=schedule)
        costs = [cost_of(program, length) for program in parallel.ranks()]
        exposed.append(simulate(costs, cluster).exposed_seconds)
    assert exposed[1] < 0.8 * exposed[0]


class Mean(nn.Module):
    """Something is taken from every sequence's mean over the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads).squeeze(1) - x.mean(0)


@pytest.mark.parametrize(
    ("program", "why", "line"),
    [
        (lambda: captured("moe-4l-tiny", 2), "experts take a limited number of tokens", "cumsum"),
        (lambda: capture(Mean().eval(), (torch.randn(2, 8, 4),)), "mixes the sequences of a batch",
         "mean"),
    ],
    ids=["capacity", "mean"],
)
def test_a_batch_whose_sequences_are_mixed_has_no_halves(
    program: Callable[[], Program], why: str, line: str
) -> None:
    with pytest.raises(RingCompileError, match=why) as error:
        transform(program(), "ring=2,halves=2")
    assert line in str(error.value)
    assert "leave out halves (--overlap halves)" in str(error.value)


def test_a_capacity_that_each_half_counts_alone_is_all_that_may_mix() -> None:
    parallel = halves("moe-4l-tiny", "ring=2", capacity="local")
    assert any("counted for each half alone" in note for note in parallel.notes)
    whole = capture(Mean().eval(), (torch.randn(2, 8, 4),))
    with pytest.raises(RingCompileError, match="this mixes the sequences of a batch"):
        transform(whole, "ring=2,halves=2", capacity="local")


class Pooled(nn.Module):
    """One number for the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads).sum()


def test_one_number_for_the_whole_batch_has_no_halves() -> None:
    program = capture(Pooled().eval(), (torch.randn(1, 8, 4),))
    with pytest.raises(RingCompileError, match="this mixes the sequences of a batch"):
        transform(program, "halves=2")


@pytest.mark.parametrize("spec", [
    "dp=2,ring=2", "pp=2,tp=2", "ring=2,time=2",
    *(pytest.param(x, marks=pytest.mark.slow) for x in (
        "pp=2,ring=2,time=2", "dp=2,pp=2", "time=3", "ep=2,time=2", "ulysses=2,time=2")),
])
@pytest.mark.parametrize("name", [
    "llama-tiny", pytest.param("mixtral-tiny", marks=pytest.mark.slow)])
def test_halves_go_with_every_axis(name: str, spec: str) -> None:
    """Batches of 4 and 6: microbatches and replicas get pairs of sequences."""
    parallel = halves(name, spec)
    for batch in (4, 6):
        compare(parallel, name, batch)


def test_an_odd_batch_and_one_that_is_fixed_have_no_halves() -> None:
    loaded = load_model("llama-tiny", batch=3)
    with pytest.raises(RingCompileError, match="a batch of 3 cannot be split into 2 equal parts"):
        run(halves("llama-tiny", "ring=2"), loaded.args)
    one = capture(loaded.module, loaded.args, loaded.kwargs, dims={"inputs": {1: "sequence"}})
    with pytest.raises(RingCompileError, match="batch is fixed at 3, and cannot be dealt out"):
        transform(one, "ring=2,halves=2")


def test_halves_and_a_cache_are_refused() -> None:
    with pytest.raises(RingCompileError, match="a cache cannot be combined with halves=2"):
        transform(captured("llama-tiny", 2), "halves=2", cache=32)
