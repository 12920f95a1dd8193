"""Which passes run, in which order: from a captured program to the program of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ringcompile.axes import HALVES, WITHOUT_RANKS
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.options import DEFAULT, Options
from ringcompile.passes.attention.recognize_attention import RecognizeAttention
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.canonicalize.canonicalize import Canonicalize
from ringcompile.passes.canonicalize.limit_ids import LimitIds
from ringcompile.passes.canonicalize.unfuse import Unfuse
from ringcompile.passes.carry.carry import Carry, carried_mesh
from ringcompile.passes.carry.decode_features import kept_along, widened
from ringcompile.passes.carry.keep import Keep
from ringcompile.passes.cleanup import CleanUp
from ringcompile.passes.experts.expert_parallel import ExpertParallel
from ringcompile.passes.experts.expert_terms import ExpertTerms, with_experts
from ringcompile.passes.experts.expert_weights import EP
from ringcompile.passes.experts.rows_of_slots import RowsOfSlots
from ringcompile.passes.experts.sort_rows import SortRows
from ringcompile.passes.masks.recognize_masks import RecognizeMasks
from ringcompile.passes.rank.dense_exchange import DenseExchange
from ringcompile.passes.rank.fuse import Fuse
from ringcompile.passes.rank.fuse_merge import FuseMerge
from ringcompile.passes.rank.lower_halo import LowerHalo
from ringcompile.passes.rank.lower_ring import LowerRing
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.passes.rank.specialize import Specialize
from ringcompile.passes.rank.unroll import Unroll
from ringcompile.passes.sequence.place import Place
from ringcompile.passes.shares.partition import Partition
from ringcompile.passes.stages.deal_batch import DealBatch
from ringcompile.passes.stages.split_pipeline import SplitPipeline, TakeStage
from ringcompile.passes.tensor.tensor_parallel import TensorParallel


def front_passes(
    mesh: Mesh,
    options: Options = DEFAULT,
    told: Mapping[str, int | None] | None = None,
    checked: dict[Any, Any] | None = None,
    *,
    carried: bool = False,
    prefill: bool = False,
) -> list[Pass]:
    """From a captured program to one program for all ranks.

    Args:
        mesh: the parallel plan.
        options: how to compile.
        told: for weights by name, the dim that `tp` splits, as the user's plan says.
        checked: as for `transform`.
        carried: write the program for the next tokens, with a cache of `options.cache` tokens.
        prefill: write the program that takes a prompt into that cache.
    """
    known = {} if checked is None else checked
    placed, split, alike = mesh, mesh, 1
    carry: list[Pass] = []
    experts: Pass = ExpertParallel(mesh)
    if prefill:
        assert options.cache is not None
        carry = [Keep(mesh, options.cache), CleanUp()]
    if carried:
        placed, split, alike, carry = _for_next_tokens(mesh, options)
        experts = ExpertTerms(with_experts(placed, mesh))
        options = replace(options, order="auto", gather_unknown=False, tp_sequence=False)
    return [
        *(Canonicalize(), RecognizeAttention(), RecognizeMasks(), CleanUp(), LimitIds()),
        *([Unfuse()] if mesh.size("tp") > 1 else []),
        *([DealBatch(mesh, known, options.capacity), CleanUp()]
          if mesh.size("dp") * mesh.size("pp") * mesh.size(HALVES) > 1 else []),
        Place(placed, options.order, options.gather_unknown, options.capacity, options.ring,
              options.tp_sequence, known, windows=not carried),
        *([RowsOfSlots()] if mesh.size(EP) == 1 and not carried else []),
        CleanUp(),
        *([experts, CleanUp()] if mesh.size(EP) > 1 else []),
        *([TensorParallel(split, told or {}, alike), CleanUp()] if split.size("tp") > 1 else []),
        *carry,
        Partition(),
        *([] if carried else [SortRows()]),
        CleanUp(),
        *([SplitPipeline(mesh, options.stages)] if mesh.size("pp") > 1 else []),
    ]


def _for_next_tokens(mesh: Mesh, options: Options) -> tuple[Mesh, Mesh, int, list[Pass]]:
    """The meshes that place and split the next tokens' program, ranks alike, and the cache."""
    assert options.cache is not None
    placed = carried_mesh(mesh)
    split = with_experts(placed, mesh)
    alike, helix = 1, options.decode == "helix" and kept_along(mesh) > 1
    if helix:
        split, alike = widened(split, mesh), kept_along(mesh)
    return placed, split, alike, [Carry(mesh, options.cache, helix), CleanUp()]


def rank_passes(
    rank: int, mesh: Mesh, schedule: Schedule | None = None, *, fuse: bool = True
) -> list[Pass]:
    """From the program for all ranks to that of one.

    Args:
        rank: which one.
        mesh: the parallel plan.
        schedule: orders the program, if one does.
        fuse: mark groups of thin ops that one kernel computes.
    """
    take = [TakeStage(mesh)] if mesh.size("pp") > 1 else []
    pieces = [Unroll()] if any(mesh.size(axis) > 1 for axis in WITHOUT_RANKS) else []
    last = [schedule] if schedule is not None else []
    groups = [Fuse()] if fuse else []
    return [
        Specialize(rank), *take, *pieces, DenseExchange(), LowerHalo(), *groups, LowerRing(),
        FuseMerge(), *last,
    ]


# The passes that come before any layout.
NUM_COMMON = [step.name for step in front_passes(Mesh(()))].index(Place.name)


def prepare(program: Program) -> Program:
    """Run what is the same for all parallel specs, once for many calls of `transform`.

    Raises:
        RingCompileError: with the user's line, for what cannot be compiled.
    """
    return Pipeline(front_passes(Mesh(()))[:NUM_COMMON]).run(with_origin(program))


def with_origin(program: Program) -> Program:
    """The program, which keeps what was captured beside what passes make of it."""
    if Canonicalize.name in program.passes:
        return program
    return program.with_graph(program.graph, captured=program)
