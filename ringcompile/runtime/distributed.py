"""One rank of a job over torch.distributed: the same code on gloo and on NCCL."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
import torch.distributed as dist

from ringcompile.ir.communication import COLLECTIVES, SHIFT
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.runtime.batches import whole_outputs
from ringcompile.runtime.collecting import Collecting
from ringcompile.runtime.drive import drive
from ringcompile.runtime.exchange import Exchange
from ringcompile.runtime.executor import Request
from ringcompile.runtime.handshake import agree, facts_of
from ringcompile.runtime.join import Rank
from ringcompile.runtime.memory import keep_freed_memory, peak_bytes
from ringcompile.runtime.outputs import EVERYTHING, Kept, Summary, from_numbers, to_numbers
from ringcompile.runtime.pieces import in_pieces
from ringcompile.runtime.runner import (
    Computed,
    OpenWeights,
    Prepared,
    Runner,
    Settings,
    computed,
    freed,
)
from ringcompile.runtime.tasks import (
    WHOLE,
    HasPrograms,
    Inputs,
    Opened,
    RankRun,
    Result,
    Run,
    Stats,
    Task,
    of_kind,
    run_task,
)
from ringcompile.runtime.tracer import Tracer
from ringcompile.traces.measured import RankTrace


class Peer:
    """One rank with its peers, ready for many tasks.

    Making one is collective, and so is each task: all ranks do the same, with the same inputs.

    Args:
        parallel: the programs for all ranks.
        rank: this process' place.
        kinds: the kinds of programs that are opened now; others are when a task needs them.
        check_inputs: whether ranks compare their inputs before every task; for inputs that each
            process got on its own.
        settings: how the rank computes.

    Raises:
        RingCompileError: the ranks run different artifacts, or different versions of torch or
            ringcompile; said before the first message.
    """

    def __init__(
        self,
        parallel: HasPrograms,
        rank: Rank,
        kinds: Sequence[str] = (WHOLE,),
        *,
        check_inputs: bool = False,
        settings: Settings | None = None,
    ) -> None:
        keep_freed_memory()
        self.parallel, self.mesh = parallel, parallel.mesh
        self.rank, self.check_inputs = rank, check_inputs
        agree(rank, facts_of(parallel.identity, parallel.mesh.world_size))
        settings = settings or Settings()
        self.exchange = Exchange(parallel.mesh, rank, check=settings.check_finite)
        self.tracer = Tracer(rank) if settings.trace else None
        self.runner = Runner(
            lambda kind: of_kind(parallel, kind).rank(rank.index),
            OpenWeights(parallel.source, rank.device), settings, self.tracer,
        )
        for kind in kinds:
            self.program(kind)

    def program(self, kind: str = WHOLE) -> Program:
        """This rank's program of a kind, with the groups of ranks that it communicates in."""
        if kind not in self.runner.opened:
            self.exchange.join(_joined(of_kind(self.parallel, kind)))
            nodes = self.runner.open(kind).program.graph.nodes
            self.exchange.locations.update({node.name: location_of(node) for node in nodes})
        return self.runner.open(kind).program

    def last(self, kind: str = WHOLE) -> Program:
        """The last rank's program; it is one of the last stage, and says what is returned."""
        return of_kind(self.parallel, kind).rank(self.rank.world_size - 1)

    def answer(self, task: Task) -> RankRun:
        """Do this rank's part of a task.

        Raises:
            RingCompileError: inputs that do not fit, or a rank that was lost on the way.
        """
        self.program(task.kind)
        if self.check_inputs:
            self.exchange.agree(_checksum(task.inputs), "inputs")
        with torch.no_grad():
            if self.tracer is not None:
                return self._traced(task, self.tracer)
            return self.timed(self.runner.prepare(task))

    def _traced(self, task: Task, tracer: Tracer) -> RankRun:
        if isinstance(task, Run):
            self.timed(self.runner.prepare(task))
        prepared = self.runner.prepare(task)
        tracer.start()
        return replace(self.timed(prepared), trace=tracer.recorded())

    def run(self, inputs: Any, keep: Kept = EVERYTHING) -> RankRun:
        """Run once on whole inputs: a mapping by name, a sequence in order, or one tensor."""
        return self.answer(run_task(self.program(), inputs, keep))

    def run_share(self, share: Inputs, lengths: dict[str, int]) -> RankRun:
        """Run once on this rank's share of the inputs, by placeholder name."""
        with torch.no_grad():
            return self.timed(self.runner.on_shares(share, lengths))

    def timed(self, prepared: Prepared) -> RankRun:
        """Compute what was prepared, once more if it was before; all ranks do.

        Raises:
            RingCompileError: a rank was lost on the way.
        """
        self.exchange.bytes_sent, self.exchange.wait_seconds = 0, 0.0
        device, started = self.rank.device, time.perf_counter()
        answer: Callable[[Request], Any] = self.exchange.answer
        if self.tracer is not None:
            answer = self.tracer.answering(answer)
        made: Computed = drive(computed(prepared), answer)
        self.exchange.end()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stats = Stats(
            self.rank.index, self.exchange.bytes_sent, time.perf_counter() - started,
            self.exchange.wait_seconds, peak_bytes(device),
        )
        return RankRun(
            made.microbatches, made.dealt, stats, made.summaries, notes=self.runner.notes()
        )

    def let_go(self) -> None:
        """Keep this rank's shares of weights alone: what the model itself holds may be freed."""
        opened = self.runner.let_go()
        ranks = {self.rank.index: opened, self.rank.world_size - 1: freed(self.last())}
        self.parallel = Opened(self.mesh, ranks, self.parallel.identity)

    def everyones_stats(self, run: RankRun) -> list[Stats]:
        """What a task cost each rank; all ranks have to call it."""
        rows = self.exchange.everyones(astuple(run.stats))
        return [
            Stats(int(rank), int(sent), seconds, waited, int(peak))
            for rank, sent, seconds, waited, peak in rows
        ]

    def everyones_traces(self, mine: RankTrace) -> list[RankTrace]:
        """What every rank did when, on rank 0; all ranks have to call it."""
        return [RankTrace.from_json(text) for text in self.exchange.texts(mine.to_json())]

    def everyones_summaries(self, run: RankRun) -> list[list[tuple[Summary, ...]]]:
        """Of each rank a list of one: of all its microbatches, of every output.

        All ranks have to call it.
        """
        mine = to_numbers(run.summaries, len(self.last().outputs))
        return [[from_numbers(row)] for row in self.exchange.everyones(mine)]

    def assemble(
        self, run: RankRun, keep: Kept = EVERYTHING, kind: str = WHOLE, everywhere: bool = False
    ) -> Any:
        """Whole outputs, nested as the model returned them, on rank 0; None on the others.

        Args:
            run: what this rank kept; all ranks call it.
            keep: what was kept.
            kind: of the program that was run.
            everywhere: give all ranks the whole outputs.
        """
        last = self.last(kind)
        shares = Collecting(self.exchange, last, run, keep.last, everywhere)
        if self.rank.index != 0 and not everywhere:
            shares.hand_over()
            return None
        return whole_outputs(last, shares.everyones(), run.dealt, keep.last)


class JobRanks:
    """This process as one rank of a job that torchrun started; all ranks do the same tasks.

    Args:
        parallel: the programs for all ranks.
        rank: this process' place.
        kinds: as for `Peer`.
        settings: how the rank computes.
    """

    def __init__(
        self, parallel: HasPrograms, rank: Rank, kinds: Sequence[str], settings: Settings
    ) -> None:
        self.peer = Peer(parallel, rank, kinds, check_inputs=True, settings=settings)
        self.reports = rank.index == 0

    def answer(self, task: Task) -> Result:
        """See `Driver`; what the others have is asked for where summaries are kept."""
        peer, run = self.peer, self.peer.answer(task)
        stats, summaries = [run.stats], [list(run.summaries)]
        if task.keep.summary:
            stats, summaries = peer.everyones_stats(run), peer.everyones_summaries(run)
        wanted = task.keep.outputs and task.whole
        outputs = peer.assemble(run, task.keep, task.kind) if wanted else None
        traces = [] if run.trace is None else peer.everyones_traces(run.trace)
        return Result(outputs, [run], stats, summaries, traces)

    def rewind(self, length: int) -> None:
        """See `Driver`."""
        self.peer.runner.rewind(length)

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """See `Driver`: rank 0 chooses, and tells the others."""
        rank = self.peer.rank
        tokens = choose() if rank.index == 0 else torch.empty(batch, dtype=torch.int64)
        on_device = tokens.to(rank.device)
        if rank.world_size > 1:
            dist.broadcast(on_device, 0)
        return on_device.cpu()

    def close(self) -> None:
        """See `Driver`; the process stays in the job."""
        del self.peer

    kill = close


def open_peer(
    rank: Rank,
    load: Callable[..., HasPrograms],
    args: tuple[Any, ...],
    kinds: Sequence[str],
    settings: Settings,
) -> str:
    """Make the rank's `Peer`, which it keeps; which artifact it is for."""
    parallel = load(*args)
    rank.state = Peer(parallel, rank, kinds, settings=settings)
    return parallel.identity


def answer_task(rank: Rank, task: Task) -> RankRun:
    """A task on a rank that has a `Peer`; outputs that are wanted whole are handed in pieces."""
    peer: Peer = rank.state
    run = peer.answer(task)
    if not (task.keep.outputs and task.whole):
        return run
    handed = tuple(in_pieces(shares, rank.world_size) for shares in run.microbatches)
    return replace(run, microbatches=(), handed=handed)


def rewind(rank: Rank, length: int) -> None:
    """Forget the tokens from position `length` on, likewise."""
    peer: Peer = rank.state
    peer.runner.rewind(length)


def _joined(parallel: HasPrograms) -> tuple[str, ...]:
    """The combinations of axes that any rank's program communicates along."""
    mesh = parallel.mesh
    stages = {mesh.coordinates(rank).get("pp", 0): rank for rank in range(mesh.world_size)}
    axes = {
        str(node.kwargs["axis"])
        for rank in stages.values()
        for node in parallel.rank(rank).graph.nodes
        if str(node.target) in {*COLLECTIVES, SHIFT}
    }
    return tuple(sorted(axis for axis in axes if "," in axis))


def _checksum(inputs: Inputs) -> int:
    checksum = 0
    for tensor in inputs.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        checksum = zlib.crc32(repr((tensor.dtype, tensor.shape)).encode(), checksum)
        checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
    return checksum
