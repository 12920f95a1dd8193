"""Streams, transfers and pipelines on little programs, with times that can be worked out by hand.

On the tests' cluster 1 TB/s and 1 TFLOP/s make a kernel of 10^9 bytes or flops take 1 ms, and a
message of 10^6 bytes takes 1 ms to start and 1 ms on its way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import networkx as nx
import pytest
import torch

from ringcompile.cost.collectives import collective_seconds, message_seconds
from ringcompile.cost.kernels import Kernel
from ringcompile.cost.rank import RankCost, TimedCollective, TimedShift, TimedStep, TimedWait
from ringcompile.cost.scaling import as_stage, moved, with_batch
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How, timeline
from tests.cost.clusters import cluster, device, figure, link, table

MB = 10**6
MS = 1e-3


def kernel(milliseconds: float) -> Kernel:
    return Kernel("stream", torch.float32, int(milliseconds * 1e9))


def compute(milliseconds: float, name: str = "compute", reads: tuple[str, ...] = ()) -> TimedStep:
    return TimedStep(name, "add", "layers.0", (kernel(milliseconds),), None, reads)


def start(
    name: str, to: int | None, source: int | None, size: int = MB, on: str = "ring"
) -> TimedStep:
    sent, taken = (size if peer is not None else 0 for peer in (to, source))
    return TimedStep(name, "shift_start", "layers.0", (), TimedShift(on, to, source, sent, taken))


def wait(name: str) -> TimedStep:
    return TimedStep(f"{name}_wait", "wait", "layers.0", (), TimedWait(name))


def reduce(name: str, group: Sequence[int], size: int = MB, on: str = "tp") -> TimedStep:
    exchange = TimedCollective("all_reduce", on, tuple(group), size)
    return TimedStep(name, "all_reduce", "layers.0", (), exchange)


def rank(number: int, *steps: TimedStep) -> RankCost:
    return RankCost(number, steps, (("layers.0.w", 1000),), 5000, len(steps))


def test_kernels_follow_one_another() -> None:
    found = simulate([rank(0, compute(2), compute(3))], cluster())
    assert found.seconds == pytest.approx(5 * MS)
    assert found.bound == "memory"
    assert found.ranks[0].compute_seconds == pytest.approx(5 * MS)
    assert found.ranks[0].exposed_seconds == 0


@pytest.mark.parametrize(("beside", "total", "exposed"), [(5, 6, 0), (1, 3, 1)])
def test_a_transfer_hides_under_compute(beside: int, total: int, exposed: int) -> None:
    """1 ms before it, 2 ms for the transfer, beside so much compute."""
    ranks = [
        rank(i, compute(1), start("t", 1 - i, 1 - i), compute(beside), wait("t")) for i in (0, 1)
    ]
    found = simulate(ranks, cluster())
    assert found.seconds == pytest.approx(total * MS)
    assert found.exposed_seconds == pytest.approx(exposed * MS)


def test_a_transfer_starts_behind_what_stands_before_it() -> None:
    """Even if its operand was there long before: that is what scheduling is for."""
    early = [rank(i, start("t", 1 - i, 1 - i), compute(4), wait("t")) for i in (0, 1)]
    late = [rank(i, compute(4), start("t", 1 - i, 1 - i), wait("t")) for i in (0, 1)]
    assert simulate(early, cluster()).seconds == pytest.approx(4 * MS)
    assert simulate(late, cluster()).seconds == pytest.approx(6 * MS)


def test_a_message_goes_when_both_ends_have_started() -> None:
    ranks = [rank(0, start("t", 1, None), wait("t")), rank(1, compute(5), start("t", None, 0),
                                                           wait("t"))]
    found = simulate(ranks, cluster())
    assert found.seconds == pytest.approx(7 * MS)
    assert [row.exposed_seconds for row in found.ranks] == pytest.approx([7 * MS, 2 * MS])


def test_transfers_on_one_axis_follow_one_another_and_on_two_do_not() -> None:
    def two(second: str) -> list[RankCost]:
        return [
            rank(i, start("a", 1 - i, 1 - i), start("b", 1 - i, 1 - i, on=second), wait("a"),
                 wait("b")) for i in (0, 1)
        ]

    assert simulate(two("ring"), cluster()).seconds == pytest.approx(4 * MS)
    assert simulate(two("pp"), cluster()).seconds == pytest.approx(2 * MS)


def test_the_slowest_rank_holds_up_a_collective() -> None:
    group = (0, 1, 2, 3)
    ranks = [rank(i, compute(1 + i), reduce("r", group)) for i in group]
    found = simulate(ranks, cluster())
    # 2 * 3/4 MB at 1 GB/s, 1 ms to start, and 2 * 2 - 1 steps of 0.1 ms.
    assert found.seconds == pytest.approx((4 + 1.5 + 1 + 0.3) * MS)
    assert found.path["communication"] == pytest.approx(2.8 * MS)
    assert found.ranks[0].exposed_seconds == pytest.approx((3 + 2.8) * MS)


def test_deferred_collectives_hold_up_the_reader() -> None:
    group = (0, 1)
    steps = (compute(1), reduce("r", group), compute(2), compute(1, "reader", ("r",)))
    ranks = [rank(i, *steps) for i in group]
    taken = (1 + 0.1 + 1) * MS  # 2 * 1/2 MB, one further step
    assert simulate(ranks, cluster()).seconds == pytest.approx(4 * MS + taken)
    later = simulate(ranks, cluster(), How(deferred=True))
    assert later.seconds == pytest.approx(1 * MS + max(taken, 2 * MS) + 1 * MS)


def test_one_rank_stands_for_all_that_are_alike() -> None:
    def at(i: int) -> RankCost:
        after, before = (i + 1) % 4, (i - 1) % 4
        steps = [compute(1), start("t", after, before), compute(1), wait("t"), compute(3)]
        return rank(i, *steps)

    everyone = simulate([at(i) for i in range(4)], cluster())
    for i in range(4):
        assert simulate([at(i)], cluster()).seconds == pytest.approx(everyone.seconds)


def test_interference_holds_up_the_compute_beside_a_transfer() -> None:
    slowed = cluster(links={"node": link(interference=figure(0.5, "1"))})
    ranks = [rank(i, start("t", 1 - i, 1 - i), compute(5), wait("t")) for i in (0, 1)]
    assert simulate(ranks, cluster()).seconds == pytest.approx(5 * MS)
    found = simulate(ranks, slowed)
    assert found.seconds == pytest.approx(6 * MS)
    assert found.path["interference"] == pytest.approx(1 * MS)


# -- the host -------------------------------------------------------------------------------------


def test_an_eager_host_can_be_the_bound() -> None:
    """10 us a node on the host, 1 us on the device."""
    steps = [compute(1e-3, f"n{i}") for i in range(100)]
    found = simulate([rank(0, *steps)], cluster(), How(eager=True))
    assert found.seconds == pytest.approx(100 * 10e-6 + 1e-6)
    assert found.bound == "host"
    assert simulate([rank(0, *steps)], cluster()).seconds == pytest.approx(100e-6)


@pytest.mark.parametrize("eager", [False, True])
def test_where_host_and_device_are_one_both_count(eager: bool) -> None:
    steps = [compute(1, f"n{i}") for i in range(3)]
    on = cluster(device=device(asynchronous=False))
    found = simulate([rank(0, *steps)], on, How(eager=eager))
    assert found.seconds == pytest.approx(3 * (1 * MS + 10e-6))


# -- pipelines ------------------------------------------------------------------------------------


def pipeline(*stage_ms: float) -> list[RankCost]:
    alone = [rank(0, compute(ms)) for ms in stage_ms]
    return [as_stage(one, i, i == len(alone) - 1, 1, MB) for i, one in enumerate(alone)]


def test_a_pipeline_fills_and_then_goes_at_the_pace_of_its_slowest_stage() -> None:
    even = simulate(pipeline(10, 10), cluster())
    assert even.seconds == pytest.approx((10 + 2 + 10) * MS)
    full = simulate(pipeline(10, 10), cluster(), How(8))
    assert full.period == pytest.approx(12 * MS)  # sending holds the stage up
    assert full.seconds == pytest.approx((8 * 12 + 10) * MS)
    slow = simulate(pipeline(10, 20, 10), cluster(), How(9))
    assert slow.period == pytest.approx(24 * MS)


def test_a_pipeline_whose_waits_are_deferred_hides_its_messages() -> None:
    full = simulate(pipeline(10, 10), cluster(), How(8, deferred=True))
    assert full.period == pytest.approx(10 * MS)


def test_bubbles_are_told_from_exposed_communication() -> None:
    found = simulate(pipeline(10, 10), cluster())
    first, second = found.ranks
    assert second.bubble_seconds == pytest.approx(12 * MS)
    assert first.bubble_seconds == pytest.approx(12 * MS)  # its message, and then nothing to do
    assert second.exposed_seconds == first.exposed_seconds == 0


# -- the same by other ways -----------------------------------------------------------------------


def ring_of(size: int) -> list[RankCost]:
    made = []
    for i in range(size):
        steps = [compute(1)]
        for t in range(size - 1):
            steps += [start(f"t{t}", (i + 1) % size, (i - 1) % size), compute(0.5 + i / size),
                      wait(f"t{t}")]
        made.append(rank(i, *steps, compute(2)))
    return made


@pytest.mark.parametrize("size", [2, 3, 5])
def test_merged_events_take_the_same_time(size: int) -> None:
    single, merged = (simulate(ring_of(size), cluster(), How(merged=m)) for m in (False, True))
    assert merged.seconds == pytest.approx(single.seconds)
    assert len(merged.timeline.events) <= len(single.timeline.events)
    assert sum(merged.path.values()) == pytest.approx(sum(single.path.values()))


def test_the_longest_path_is_what_networkx_finds() -> None:
    found = timeline(ring_of(4), cluster())
    weighted = nx.DiGraph((b, a) for a, others in enumerate(found.before) for b in others)
    assert nx.is_directed_acyclic_graph(weighted)
    assert set(weighted) == set(range(len(found.events)))
    for a, b in weighted.edges:
        weighted[a][b]["weight"] = found.events[b].seconds
    longest = nx.dag_longest_path_length(weighted)
    begun = max(found.events[n].seconds for n, before in enumerate(found.before) if not before)
    assert longest <= found.seconds <= longest + begun
    path = found.critical_path()
    assert sum(found.events[n].seconds for n in path) == pytest.approx(found.seconds)
    assert all(weighted.has_edge(a, b) for a, b in pairwise(path))


# -- messages and collectives ---------------------------------------------------------------------


def test_messages_go_over_the_link_between_their_ends() -> None:
    two = cluster(per_node=2, nodes=2)
    assert message_seconds(two, 0, 1, MB) == pytest.approx(2 * MS)
    assert message_seconds(two, 1, 2, MB) == pytest.approx(11 * MS)


COLLECTIVES = [
    ("gather", 4, 3.0), ("reduce_scatter", 4, 0.75), ("all_to_all", 4, 0.75),
    ("all_reduce", 4, 1.5), ("all_reduce", 8, 1.75), ("dispatch", 2, 0.5), ("combine", 2, 0.5),
]


@pytest.mark.parametrize(("kind", "size", "sent"), COLLECTIVES)
def test_collectives_on_one_node(kind: str, size: int, sent: float) -> None:
    """Megabytes sent by a rank that brings one, at 1 GB/s, beside startup and further steps."""
    depth = {2: 1, 4: 2, 8: 3}[size]
    steps = 2 * depth - 1 if kind == "all_reduce" else depth - 1
    found = collective_seconds(cluster(), TimedCollective(kind, "tp", tuple(range(size)), MB))
    assert found == pytest.approx((1 + 0.1 * steps + sent) * MS)


def test_collectives_of_one_or_of_nothing_are_free() -> None:
    assert collective_seconds(cluster(), TimedCollective("all_reduce", "tp", (3,), MB)) == 0
    assert collective_seconds(cluster(), TimedCollective("all_reduce", "tp", (0, 1), 0)) == 0


def test_a_collective_across_nodes_uses_all_links_between_them() -> None:
    two = cluster(per_node=4, nodes=2)
    scattered = TimedCollective("reduce_scatter", "tp", (0, 1, 2, 3), MB)
    within = collective_seconds(cluster(), scattered)
    across = (1 + 0.1 + 2 / 2 * 0.25 / 0.1) * MS  # a quarter of it, at a tenth of the speed
    back = (1 + 0.1 + 3 / 4) * MS
    found = collective_seconds(two, TimedCollective("all_reduce", "tp", tuple(range(8)), MB))
    assert found == pytest.approx(within + across + back)
    one_each = collective_seconds(two, TimedCollective("all_reduce", "tp", (0, 4), MB))
    assert one_each == pytest.approx((1 + 0.1 + 10) * MS)


def test_exchanges_across_nodes_go_both_ways_at_once() -> None:
    two = cluster(per_node=2, nodes=2)
    found = collective_seconds(two, TimedCollective("all_to_all", "ep", (0, 1, 2, 3), MB))
    assert found == pytest.approx((1 + 0.5 / 0.1) * MS)  # half of it leaves the node


def test_a_switch_that_reduces_is_a_figure_of_its_own() -> None:
    fast = cluster(links={"node": link(all_reduce=figure(3.0, "GB/s"))})
    found = collective_seconds(fast, TimedCollective("all_reduce", "tp", (0, 1, 2, 3), MB))
    assert found == pytest.approx((1 + 0.3 + 0.5) * MS)


def test_short_messages_may_be_slower() -> None:
    slow = figure([0.1, 1.0], "GB/s", bytes=[1e3, 1e6])
    found = cluster(links={"node": link(bandwidth=slow)})
    assert message_seconds(found, 0, 1, 1000) == pytest.approx(1 * MS + 1e-5)
    assert message_seconds(found, 0, 1, MB) == pytest.approx(2 * MS)


# -- scaling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [How(), How(3), How(2, eager=True), How(2, deferred=True),
                                 How(merged=True)], ids=str)
def test_every_event_begins_when_the_last_of_those_before_it_ends(how: How) -> None:
    steps = [compute(1), start("x", 1, 1, 3 * MB), compute(2, "more"), wait("x"),
             reduce("sum", (0, 1)), compute(1, "end", ("sum",))]
    others = [start("x", 0, 0), compute(4), wait("x"), reduce("sum", (0, 1)), compute(2, "end")]
    found = timeline([rank(0, *steps), rank(1, *others)], cluster(), how)
    assert len(found.events) > len(steps) + len(others) or how.merged
    for number, before in enumerate(found.before):
        ends = [found.ends[other] for other in before]
        assert found.start(number) == pytest.approx(max(ends, default=0.0))
        delayed = before[ends.index(max(ends))] if before else None
        assert found.last[number] == delayed


def test_a_batch_multiplies_all_but_the_weights() -> None:
    product = Kernel("matmul", torch.float32, 4 * (2 * 3 + 3 * 5 + 2 * 5), 60, 2, 3, 5)
    attended = Kernel("attention", torch.float32, 80, 40, 2, 8, 2, batch=3)
    cost = rank(0, TimedStep("a", "linear", "", (product, attended)), start("t", 1, 1), wait("t"),
                reduce("r", (0, 1)))
    more = with_batch(cost, 4)
    first, second = more.steps[0].kernels
    assert (first.rows, first.flops) == (8, 240)
    assert first.num_bytes == 4 * (8 * 3 + 3 * 5 + 8 * 5)
    assert (second.batch, second.rows, second.flops, second.num_bytes) == (12, 2, 160, 320)
    assert more.bytes_sent == 4 * cost.bytes_sent
    assert more.peak_bytes == 1000 + 4 * 4000
    assert with_batch(cost, 1) is cost


def test_a_stage_further_on_meets_others() -> None:
    cost = moved(rank(1, start("t", 0, 2), reduce("r", (0, 1))), 8)
    assert cost.rank == 9
    assert cost.steps[0].communicates == TimedShift("ring", 8, 10, MB, MB)
    assert cost.steps[1].communicates == TimedCollective("all_reduce", "tp", (8, 9), MB)


def test_the_tests_table_is_as_it_says() -> None:
    assert json.dumps(table()) == json.dumps(table())
    assert cluster().device.value("stream") == 1e12
