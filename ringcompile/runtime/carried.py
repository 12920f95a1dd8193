"""Runs the ranks of a program with a cache, call by call: in this process, or one process each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringcompile.ir.expr import SEQUENCE, equal, symbol
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.runtime.batches import Deal, deal, whole_outputs
from ringcompile.runtime.cache import Memory
from ringcompile.runtime.distributed import Parallel, RankRun, Session
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.inprocess import read_all_weights
from ringcompile.runtime.join import Rank
from ringcompile.runtime.launcher import LocalRanks
from ringcompile.runtime.lockstep import LockStep

Inputs = dict[str, torch.Tensor]
_MAX_EXECUTORS = 16  # one for each number of new tokens lately seen


class Driver(Protocol):
    """Runs all ranks for the new tokens of a call."""

    def extend(self, inputs: Inputs, new: int, last: bool) -> Any:
        """Whole outputs for the new tokens, or for the last of them, nested as the model's."""

    def prompt(self, inputs: Inputs, length: int) -> None:
        """Take in the first tokens, each rank its share of them; no outputs."""

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """The tokens [batch] that are chosen once, for all ranks."""

    def close(self) -> None:
        """End the ranks."""


def _outputs(
    program: Program, shares: Sequence[Sequence[torch.Tensor]], dealt: Deal, last: bool
) -> Any:
    """Whole outputs from each rank's share."""
    kept = _of_last(dealt) if last else dealt
    return whole_outputs(program, [[share] for share in shares], kept)


def _of_last(dealt: Deal) -> Deal:
    """How the batch was dealt, with one token of each sequence."""
    hands = tuple(
        tuple(replace(part, lengths={**part.lengths, SEQUENCE: 1}) for part in hand)
        for hand in dealt.hands
    )
    return Deal({**dealt.lengths, SEQUENCE: 1}, hands)


def _kept(
    program: Program, outputs: Sequence[torch.Tensor], last: bool
) -> tuple[torch.Tensor, ...]:
    """A rank's share of its outputs; of the last of the new tokens only, if that is wanted."""
    if not last:
        return tuple(outputs)
    made = []
    for node, x in zip(program.outputs, outputs, strict=True):
        for dim, size in enumerate(type_of(node).shape):
            if equal(size, symbol(SEQUENCE)):
                x = x.narrow(dim, x.shape[dim] - 1, 1).clone()
        made.append(x)
    return tuple(made)


class LockStepDriver:
    """All ranks in this process.

    Args:
        parallel: the programs for the next tokens.
        prefill: those that take in a prompt, if there are any.
        check_types: hold every value against the type that its node declares.
    """

    def __init__(
        self, parallel: Parallel, prefill: Parallel | None = None, check_types: bool = False
    ) -> None:
        self.mesh, ranks = parallel.mesh, range(parallel.mesh.world_size)
        self.programs = [parallel.rank(rank) for rank in ranks]
        self.prompts = [] if prefill is None else [prefill.rank(rank) for rank in ranks]
        weights = list(read_all_weights([*self.programs, *self.prompts], parallel.source))
        self.weights, self.prompt_weights = weights[: len(ranks)], weights[len(ranks) :]
        self.memories = [Memory(program) for program in self.programs]
        self.executors: dict[Any, list[Executor]] = {}
        self.check_types, self.bytes_sent = check_types, [0] * len(self.programs)

    @torch.no_grad()
    def extend(self, inputs: Inputs, new: int, last: bool) -> Any:
        """See `Driver`; after an error the tokens before the call are still there."""
        before = self.memories[0].length
        try:
            return self._extended(inputs, new, last)
        except BaseException:
            self.rewind(before)
            raise

    def _extended(self, inputs: Inputs, new: int, last: bool) -> Any:
        dealt = deal(self.programs[0], inputs)
        generators = [
            executor.run({**weights, **memory.begin(inputs, new, dealt.of(memory.program)[0])})
            for executor, weights, memory in zip(
                self._executors(dealt), self.weights, self.memories, strict=True
            )
        ]
        results, self.bytes_sent = LockStep(self.mesh).run(generators)
        shares = [_kept(*pair, last) for pair in zip(self.programs, results, strict=True)]
        return _outputs(self.programs[-1], shares, dealt, last)

    @torch.no_grad()
    def prompt(self, inputs: Inputs, length: int) -> None:
        """See `Driver`; after an error there are no tokens."""
        dealt = deal(self.prompts[0], inputs)
        try:
            generators = []
            for program, weights, memory in zip(
                self.prompts, self.prompt_weights, self.memories, strict=True
            ):
                (part,) = dealt.of(program)
                executor = Executor(program, part.lengths, check_types=self.check_types)
                values = memory.begin_prompt(program, inputs, length, part)
                generators.append(executor.run({**weights, **values}))
            self.bytes_sent = LockStep(self.mesh).run(generators)[1]
        except BaseException:
            self.rewind(0)
            raise

    def _executors(self, dealt: Deal) -> list[Executor]:
        key = tuple(dealt.lengths.items())
        if key not in self.executors:
            if len(self.executors) == _MAX_EXECUTORS:
                self.executors.clear()
            self.executors[key] = [
                Executor(program, dealt.of(program)[0].lengths, check_types=self.check_types)
                for program in self.programs
            ]
        return self.executors[key]

    def rewind(self, length: int) -> None:
        """See `Driver`."""
        for memory in self.memories:
            memory.rewind(length)

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """See `Driver`: the next call hands them to all ranks."""
        return choose()

    def close(self) -> None:
        """Let weights and caches go."""
        self.weights, self.memories = [], []


class ProcessDriver:
    """A process of this machine for each rank, which keeps its weights and its cache.

    Args:
        load: as for `LocalRanks`; gives the programs for the next tokens.
        args: likewise.
        prefill: gives those that take in a prompt, from the same arguments, if there are any.
        options: likewise.
    """

    def __init__(
        self,
        load: Callable[..., Parallel],
        args: tuple[Any, ...],
        prefill: Callable[..., Parallel] | None = None,
        **options: Any,
    ) -> None:
        self.ranks = LocalRanks(load, args, **options)
        self.bytes_sent: list[int] = []
        try:
            self.ranks.call(_remember, prefill, args)
        except BaseException:
            self.ranks.kill()
            raise

    def extend(self, inputs: Inputs, new: int, last: bool) -> Any:
        """See `Driver`."""
        dealt = deal(self.ranks.program, inputs)
        runs: list[RankRun] = self.ranks.call(extend_rank, inputs, new, last)
        self.bytes_sent = [run.stats.bytes_sent for run in runs]
        return _outputs(self.ranks.last, [run.outputs for run in runs], dealt, last)

    def prompt(self, inputs: Inputs, length: int) -> None:
        """See `Driver`."""
        runs: list[RankRun] = self.ranks.call(prompt_rank, inputs, length)
        self.bytes_sent = [run.stats.bytes_sent for run in runs]

    def rewind(self, length: int) -> None:
        """See `Driver`."""
        self.ranks.call(_rewind, length)

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """See `Driver`: the next call hands them to all ranks."""
        return choose()

    def close(self) -> None:
        """End the processes."""
        self.ranks.close()


class JobDriver:
    """This process as one rank of a job that torchrun started; all ranks make the same calls.

    Args:
        parallel: the programs for the next tokens.
        rank: this process' place.
        prefill: those that take in a prompt, if there are any.
    """

    def __init__(self, parallel: Parallel, rank: Rank, prefill: Parallel | None = None) -> None:
        rank.state = Session(parallel, rank, check_inputs=True)
        _remember(rank, None if prefill is None else lambda: prefill, ())
        self.rank = rank

    def extend(self, inputs: Inputs, new: int, last: bool) -> Any:
        """See `Driver`; outputs on rank 0, None on the others."""
        session: Session = self.rank.state.session
        run = extend_rank(self.rank, inputs, new, last)
        return session.assemble(replace(run, dealt=_of_last(run.dealt)) if last else run)

    def prompt(self, inputs: Inputs, length: int) -> None:
        """See `Driver`."""
        prompt_rank(self.rank, inputs, length)

    def rewind(self, length: int) -> None:
        """See `Driver`."""
        _rewind(self.rank, length)

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """See `Driver`: rank 0 chooses, and tells the others."""
        tokens = torch.empty(batch, dtype=torch.int64)
        if self.rank.index == 0:
            tokens = choose()
        on_device = tokens.to(self.rank.device)
        if self.rank.world_size > 1:
            dist.broadcast(on_device, 0)
        return on_device.cpu()

    def close(self) -> None:
        """Let weights and cache go; the process stays in the job."""
        self.rank.state = None


@dataclass
class _Kept:
    """What the process of a rank keeps: its sessions, which share weights, and its memory."""

    session: Session
    prompts: Session | None
    memory: Memory


def _remember(
    rank: Rank, prefill: Callable[..., Parallel] | None, args: tuple[Any, ...]
) -> None:
    session: Session = rank.state
    prompts = None if prefill is None else session.beside(prefill(*args))
    rank.state = _Kept(session, prompts, Memory(session.program, rank.device))


def extend_rank(rank: Rank, inputs: Inputs, new: int, last: bool) -> RankRun:
    """The new tokens of a call on one rank, whose state is a `_Kept`."""
    session, memory = rank.state.session, rank.state.memory
    dealt = deal(session.program, inputs)
    (part,) = dealt.of(session.program)
    run = session.run_shares(dealt, [(memory.begin(inputs, new, part), part)])
    return replace(run, outputs=_kept(session.program, run.outputs, last))


def prompt_rank(rank: Rank, inputs: Inputs, length: int) -> RankRun:
    """A prompt on one rank, likewise."""
    session = rank.state.prompts
    dealt = deal(session.program, inputs)
    (part,) = dealt.of(session.program)
    values = rank.state.memory.begin_prompt(session.program, inputs, length, part)
    return session.run_shares(dealt, [(values, part)])


def _rewind(rank: Rank, length: int) -> None:
    rank.state.memory.rewind(length)
