"""The cluster as it is: kernels of every device, links within nodes and between, as a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ringcompile.calibration import (
    Probe,
    cluster_table,
    device_figures,
    device_title,
    link_figures,
    link_sizes,
    worst,
)
from ringcompile.errors import RingCompileError
from ringcompile.runtime.join import Rank
from ringcompile.runtime.speed import link_seconds

_T = TypeVar("_T")


def everyones(rank: Rank, mine: _T) -> list[_T]:
    """What every rank has of something, in order; all ranks call it."""
    found: list[Any] = [None] * rank.world_size
    dist.all_gather_object(found, mine)
    return found


def decided(rank: Rank, choose: Callable[[], _T]) -> _T:
    """What rank 0 chooses, on all ranks; all ranks call it."""
    chosen: list[Any] = [choose() if rank.index == 0 else None]
    dist.broadcast_object_list(chosen, 0)
    found: _T = chosen[0]
    return found


@dataclass(frozen=True)
class Nodes:
    """How ranks are placed on nodes: node by node, equally many on each.

    Attributes:
        count: the number of nodes.
        per_node: the ranks of each.
    """

    count: int
    per_node: int

    @property
    def links(self) -> dict[str, list[list[int]]]:
        """By name of a link, the groups of ranks that are joined by it alone."""
        inside = [list(range(n * self.per_node, (n + 1) * self.per_node))
                  for n in range(self.count)]
        between = [list(ranks) for ranks in zip(*inside, strict=True)]
        groups = {"node": inside, "between": between}
        return {name: found for name, found in groups.items() if len(found[0]) > 1}


def nodes_of(rank: Rank, per_node: int | None) -> Nodes:
    """The placement of a job's ranks.

    Args:
        rank: this process' place.
        per_node: ranks of a node; by default as many as the launcher started on this one.

    Raises:
        RingCompileError: nodes have different numbers of ranks.
    """
    here = per_node or int(os.environ.get("LOCAL_WORLD_SIZE", rank.world_size))
    counts = everyones(rank, here)
    if len(set(counts)) > 1 or rank.world_size % here:
        raise RingCompileError(
            f"nodes have {', '.join(map(str, sorted(set(counts))))} ranks each, "
            f"{rank.world_size} in all: they have to be equally many on each node",
            hint="start torchrun with the same --nproc-per-node on all nodes",
        )
    return Nodes(rank.world_size // here, here)


def measured_table(rank: Rank, nodes: Nodes, *, quick: bool) -> dict[str, Any]:
    """A hardware table of the job's devices and links; the slowest of each counts.

    Args:
        rank: this process' place; all ranks call it.
        nodes: how they are placed.
        quick: a dry run on small sizes, whose numbers mean nothing.
    """
    on_gpu = rank.device.type == "cuda"
    sizes = "quick" if quick else rank.device.type
    work = Probe(rank.device, torch.float16 if on_gpu else torch.float32, sizes, 1)
    devices = worst(everyones(rank, device_figures(work, quiet=rank.index > 0)))
    messages = link_sizes(quick=quick)
    links = {}
    for name, groups in nodes.links.items():
        made = [dist.new_group(group) for group in groups]
        mine = next(g for g, ranks in zip(made, groups, strict=True) if rank.index in ranks)
        found = everyones(rank, link_seconds(rank, messages, mine))
        links[name] = link_figures(found, messages, len(groups[0]))
    shape = (nodes.count, nodes.per_node)
    return cluster_table(rank.device, devices, links, None, shape, device_title(rank.device))
