"""The time of communication between ranks, by algorithm and by the links that it uses.

Sizes follow the usual algorithms: p ranks with B bytes each send (p-1) B in an all-gather,
(p-1)/p B in a reduce-scatter or an all-to-all, twice that in an all-reduce (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from __future__ import annotations

from collections import Counter
from math import ceil, log2

from ringcompile.cost.hardware import Cluster, Link
from ringcompile.cost.rank import TimedCollective, TimedShift

# What is read in a link's table for each kind: nccl-tests calls it bus bandwidth.
_FIGURES = {"gather": "all_gather", "reduce_scatter": "all_gather", "all_reduce": "all_reduce",
            "all_to_all": "all_to_all", "dispatch": "all_to_all", "combine": "all_to_all"}
# Small ones of these are all alike: a message from every rank to every other one.
_SMALL = frozenset({"gather", "reduce_scatter", "all_reduce", "all_to_all"})


def message_seconds(cluster: Cluster, source: int, to: int, num_bytes: int) -> float:
    """The time of one message between two ranks, once both are ready."""
    link = cluster.link(source, to)
    return link.value("startup") + link.seconds(num_bytes)


def collective_seconds(cluster: Cluster, exchange: TimedCollective) -> float:
    """The time of a collective, once all ranks of its group are ready.

    If a group spans nodes with several ranks each, all links between the nodes are used at once:
    an all-reduce is a reduce-scatter within the nodes, an all-reduce between them, and an
    all-gather within.
    """
    kind, brought, group = exchange.kind, exchange.brought, exchange.group
    if len(group) == 1 or not brought:
        return 0.0
    by_node = Counter(cluster.node_of(rank) for rank in group)
    inside, num_nodes = min(by_node.values()), len(by_node)
    if num_nodes == 1:
        link = cluster.links["node"]
        small = link.figures.get("small")
        if small is not None and kind in _SMALL and brought <= small.points("bytes")[-1]:
            return small(bytes=brought)
        return _flat(kind, brought, len(group), link)
    between = cluster.links["between"]
    if inside == 1 or len(set(by_node.values())) > 1:
        return _flat(kind, brought, len(group), between)
    node = cluster.links["node"]
    if _FIGURES[kind] == "all_to_all":  # both at once: to ranks of the node, and to those of others
        share = brought / len(group)
        away = share * inside * (num_nodes - 1)
        return max(
            _flat(kind, share * inside, inside, node),
            between.value("startup") + num_steps(kind, num_nodes) * between.value("latency")
            + away / _rate(kind, away, between),
        )
    if kind == "gather":
        across = _flat(kind, brought, num_nodes, between)
        return across + _flat(kind, brought * num_nodes, inside, node)
    within = _flat("reduce_scatter", brought, inside, node)
    across = _flat(kind, brought / inside, num_nodes, between)
    if kind == "reduce_scatter":
        return within + across
    return within + across + _flat("gather", brought / inside, inside, node)


def _flat(kind: str, brought: float, num_ranks: int, link: Link) -> float:
    """The time of a collective whose links are all alike."""
    share = (num_ranks - 1) / num_ranks
    whole = brought * num_ranks if kind == "gather" else brought
    sent = whole * share * (2 if kind == "all_reduce" else 1)
    steps = num_steps(kind, num_ranks)
    return link.value("startup") + steps * link.value("latency") + sent / _rate(kind, whole, link)


def _rate(kind: str, num_bytes: float, link: Link) -> float:
    figure = link.figures.get(_FIGURES[kind], link.figures["bandwidth"])
    return figure(bytes=num_bytes)


def num_steps(kind: str, num_ranks: int) -> int:
    """The number of steps after the first one: a tree has log2 p, an all-reduce twice as many.

    Args:
        kind: the collective's name.
        num_ranks: the number of ranks in the group.
    """
    depth = ceil(log2(num_ranks))
    return 2 * depth - 1 if kind == "all_reduce" else depth - 1


def held_up(cluster: Cluster, rank: int, shift: TimedShift, num_bytes: int) -> float:
    """The compute time that a rank loses while a transfer uses its memory."""
    peer = shift.to if shift.to is not None else shift.source
    if peer is None:
        return 0.0
    link = cluster.link(rank, peer)
    return link.value("interference") * message_seconds(cluster, rank, peer, num_bytes)
