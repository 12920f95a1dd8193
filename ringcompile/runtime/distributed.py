"""Runs one rank's program over torch.distributed: the same code on gloo and on NCCL."""

from __future__ import annotations

import copy
import math
import resource
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import torch
from torch import fx

from ringcompile.ir.communication import COLLECTIVES
from ringcompile.ir.expr import bind
from ringcompile.ir.nodes import layout_of, location_of, type_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.types import local_shape
from ringcompile.mesh import Mesh
from ringcompile.runtime.batches import Deal, Part, deal, part_of, uses_numbers, whole_outputs
from ringcompile.runtime.data import name_inputs, share_keys, shares_of
from ringcompile.runtime.drive import drive
from ringcompile.runtime.exchange import Exchange
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.finite import finite_watch
from ringcompile.runtime.handshake import agree, facts_of
from ringcompile.runtime.inprocess import read_weights
from ringcompile.runtime.join import Rank
from ringcompile.runtime.memory import keep_freed_memory
from ringcompile.runtime.outputs import EVERYTHING, Keep, Summary, from_numbers, to_numbers
from ringcompile.runtime.tail import rows_by_rank

_MAX_EXECUTORS = 16  # one for each combination of lengths lately seen


class Parallel(Protocol):
    """A program for all ranks, as compiled or as loaded from an artifact."""

    @property
    def mesh(self) -> Mesh:
        """The mesh it is for."""

    def rank(self, rank: int, /) -> Program:
        """The program of one rank."""

    @property
    def source(self) -> WeightSource | None:
        """Where the data of weights comes from."""

    @property
    def identity(self) -> str:
        """A digest of all that the ranks must have in common."""


@dataclass(frozen=True)
class Stats:
    """What one run cost a rank.

    Attributes:
        rank: the rank.
        bytes_sent: bytes handed to other ranks by the program's transfers.
        seconds: from the rank's share of the inputs to its outputs.
        wait_seconds: the part of it spent waiting for others (on the host: near zero with NCCL).
        peak_bytes: the process' largest resident memory so far; with CUDA, of device memory.
    """

    rank: int
    bytes_sent: int
    seconds: float
    wait_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class RankRun:
    """A rank's share of every output, how the batch of the run was dealt, and its cost.

    Attributes:
        outputs: of the first microbatch; a stage of a pipeline that is not the last has none.
        dealt: the lengths of the run, and the parts of its batch.
        stats: what it cost, all microbatches together.
        others: the outputs of later microbatches.
        summaries: of each microbatch, of this rank's share of every output, if they are kept.
    """

    outputs: tuple[torch.Tensor, ...]
    dealt: Deal
    stats: Stats
    others: tuple[tuple[torch.Tensor, ...], ...] = ()
    summaries: tuple[tuple[Summary, ...], ...] = ()

    @property
    def microbatches(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """The outputs of every microbatch."""
        return (self.outputs, *self.others)


class Session:
    """One rank's program with its weights and its peers, ready for many runs.

    Making one is collective, and so is `run`: all ranks call it, with the same inputs.

    Args:
        parallel: the program for all ranks.
        rank: this process' place.
        check_inputs: whether ranks compare their inputs before every run; for inputs that each
            process got on its own.
        compiler: a backend of torch.compile for what is computed between communications; see
            `Executor`.
        check_finite: look for the first NaN or infinity, and have ranks compare what they are about
            to exchange; see `finite_watch` and `stamps`.

    Raises:
        RingCompileError: the ranks run different artifacts, or different versions of torch or
            ringcompile; said before the first message.
    """

    def __init__(
        self,
        parallel: Parallel,
        rank: Rank,
        *,
        check_inputs: bool = False,
        compiler: str | None = None,
        check_finite: bool = False,
    ) -> None:
        keep_freed_memory()
        self.compiler, self.check_finite = compiler, check_finite
        self.rank, self.check_inputs, self.mesh = rank, check_inputs, parallel.mesh
        self.program = parallel.rank(rank.index)
        # The last rank is one of the last stage: its program says what is returned.
        self.last = parallel.rank(rank.world_size - 1)
        agree(rank, facts_of(parallel.identity, parallel.mesh.world_size))
        self.exchange = Exchange(
            parallel.mesh, rank, _joined(parallel),
            locations={node.name: location_of(node) for node in self.program.graph.nodes},
            check=check_finite,
        )
        self.weights = read_weights(self.program, parallel.source, rank.device)
        self.numbered = uses_numbers(self.program)
        self._executors: dict[Any, Executor] = {}

    def run(self, inputs: Any, keep: Keep = EVERYTHING) -> RankRun:
        """Run once on whole inputs: a mapping by name, a sequence in order, or one tensor.

        Args:
            inputs: the inputs.
            keep: what is kept of the outputs.

        Raises:
            RingCompileError: inputs that do not fit, or a rank that was lost on the way.
        """
        whole = name_inputs(self.program, inputs)
        dealt = deal(self.program, whole)
        if self.check_inputs:
            self.exchange.agree(_checksum(whole), "inputs")
        parts = dealt.of(self.program)
        shares = [
            shares_of(self.program, part_of(self.program, whole, part), part.lengths)
            for part in parts
        ]
        return self.run_shares(dealt, list(zip(shares, parts, strict=True)), keep)

    def beside(self, parallel: Parallel) -> Session:
        """A session of another program for the same ranks, over the same weights and peers.

        Args:
            parallel: programs of the same artifact, which communicate along single axes only.
        """
        other = copy.copy(self)
        other.program, other.last = (parallel.rank(rank) for rank in
                                     (self.rank.index, self.rank.world_size - 1))
        assert not _joined(parallel), f"no groups along {_joined(parallel)}"
        known = {key: self.weights[name] for name, key in share_keys(self.program).items()}
        keys = share_keys(other.program)
        new = {name: weight for name, weight in other.program.weights.items()
               if keys[name] not in known}
        read = read_weights(
            other.program.with_graph(other.program.graph, weights=new), parallel.source,
            self.rank.device,
        )
        other.weights = {name: read[name] if name in read else known[key]
                         for name, key in keys.items()}
        other._executors, other.numbered = {}, uses_numbers(other.program)
        return other

    def run_share(self, share: dict[str, torch.Tensor], lengths: dict[str, int]) -> RankRun:
        """Run once on this rank's share of the inputs, by placeholder name."""
        part = Part(0, 0, lengths)
        dealt = Deal(lengths, ((part,),) * self.mesh.size("dp"))
        return self.run_shares(dealt, [(share, part)])

    def run_shares(
        self,
        dealt: Deal,
        shares: Sequence[tuple[dict[str, torch.Tensor], Part]],
        keep: Keep = EVERYTHING,
    ) -> RankRun:
        """Run on this rank's shares of some microbatches, in order."""
        device = self.rank.device
        lengths = [part.needed(self.numbered) for _, part in shares]
        executors = [self._executor(needed, keep) for needed in lengths]
        self.exchange.bytes_sent, self.exchange.wait_seconds = 0, 0.0
        started, outputs, summaries = time.perf_counter(), [], []
        with torch.no_grad():
            for executor, (share, _), needed in zip(executors, shares, lengths, strict=True):
                values = {name: tensor.to(device) for name, tensor in share.items()}
                generator = executor.run({**self.weights, **values})
                made = drive(generator, self.exchange.answer)
                kept, summary = keep.of(self.program, made, needed)
                outputs.append(kept)
                summaries.append(summary)
        self.exchange.end()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stats = Stats(
            self.rank.index,
            self.exchange.bytes_sent,
            time.perf_counter() - started,
            self.exchange.wait_seconds,
            _peak_bytes(device),
        )
        return RankRun(outputs[0], dealt, stats, tuple(outputs[1:]), tuple(summaries))

    def everyones_stats(self, run: RankRun) -> list[Stats]:
        """What the run cost each rank; all ranks have to call it."""
        rows = self.exchange.everyones(astuple(run.stats))
        return [
            Stats(int(rank), int(sent), seconds, waited, int(peak))
            for rank, sent, seconds, waited, peak in rows
        ]

    def everyones_summaries(self, run: RankRun) -> list[list[tuple[Summary, ...]]]:
        """Of each rank a list of one: of all its microbatches, of every output.

        All ranks have to call it.
        """
        mine = to_numbers(run.summaries, len(self.last.outputs))
        return [[from_numbers(row)] for row in self.exchange.everyones(mine)]

    def assemble(
        self, run: RankRun, keep: Keep = EVERYTHING, everywhere: bool = False
    ) -> Any:
        """Whole outputs, nested as the model returned them, on rank 0; None on the others.

        Args:
            run: what this rank kept; all ranks call it.
            keep: as for `run`.
            everywhere: give all ranks the whole outputs.
        """
        microbatches = [
            self._collected(share, [hand[i] for hand in run.dealt.hands], keep.last, everywhere)
            for i, share in enumerate(run.microbatches)
        ]
        if self.rank.index != 0 and not everywhere:
            return None
        everyones = list(zip(*microbatches, strict=True))
        return whole_outputs(self.last, everyones, run.dealt, keep.last)

    def _collected(
        self, share: tuple[torch.Tensor, ...], parts: Sequence[Part], last: int | None,
        everywhere: bool,
    ) -> list[tuple[torch.Tensor, ...]]:
        """Every rank's share of every output of a microbatch, on rank 0 or on all.

        Ranks that return nothing take part with an empty tensor; what all hold whole stays where
        it is. Replicas may differ by a sequence: all bring as much as the largest of them.
        """
        replicated = self.mesh.size("dp") * self.mesh.size("pp") == 1
        columns = []
        for i, node in enumerate(self.last.outputs):
            if replicated and layout_of(node).is_whole:
                columns.append([share[i]] * self.rank.world_size)
                continue
            lengths = parts[0].lengths
            rows = None if last is None else rows_by_rank(self.last, type_of(node), lengths, last)
            shapes = [self._shape_of(node, part, rows) for part in parts]
            mine = share[i] if share else torch.empty(
                0, dtype=type_of(node).dtype, device=self.rank.device
            )
            mine = mine if rows is None or not share else rows.padded(mine)
            flat = mine.new_zeros(max(map(math.prod, shapes)))
            flat[: mine.numel()] = mine.reshape(-1)
            everyones = [
                x[: math.prod(shape)].reshape(shape)
                for rank, x in enumerate(self.exchange.collect(flat, everywhere))
                for shape in [shapes[self.mesh.coordinates(rank).get("dp", 0)]]
            ]
            columns.append(everyones if rows is None else rows.cut(everyones))
        return list(zip(*columns, strict=True)) if self.rank.index == 0 or everywhere else []

    def _shape_of(self, node: fx.Node, part: Part, rows: Any) -> list[int]:
        """Of a rank's share of an output, padded where ranks hold unlike numbers of rows."""
        shape = [
            int(bind(size, part.lengths))
            for size in local_shape(type_of(node), self.mesh, self.last.sequence)
        ]
        if rows is not None:
            shape[rows.dim] = max(rows.counts)
        return shape

    def _executor(self, lengths: dict[str, int], keep: Keep = EVERYTHING) -> Executor:
        key = (tuple(sorted(lengths.items())), keep.last)
        if key not in self._executors:
            if len(self._executors) == _MAX_EXECUTORS:
                self._executors.clear()
            program = keep.program(self.program, lengths)
            self._executors[key] = Executor(
                program, lengths, self.rank.device, compiler=self.compiler,
                watch=finite_watch(program) if self.check_finite else None,
            )
        return self._executors[key]


def _joined(parallel: Parallel) -> tuple[str, ...]:
    """The combinations of axes that any rank's program communicates along."""
    mesh = parallel.mesh
    stages = {mesh.coordinates(rank).get("pp", 0): rank for rank in range(mesh.world_size)}
    axes = {
        str(node.kwargs["axis"])
        for rank in stages.values()
        for node in parallel.rank(rank).graph.nodes
        if str(node.target) in COLLECTIVES
    }
    return tuple(sorted(axis for axis in axes if "," in axis))


def _checksum(inputs: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for tensor in inputs.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        checksum = zlib.crc32(repr((tensor.dtype, tensor.shape)).encode(), checksum)
        checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
    return checksum


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
