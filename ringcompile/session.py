"""The ranks of a program, which keep weights and cache and do one task after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import torch
from torch.utils import _pytree as pytree

from ringcompile import artifact
from ringcompile.errors import RingCompileError, RingCompileWarning
from ringcompile.held import scratch
from ringcompile.ir.expr import BATCH, symbol
from ringcompile.ir.program import Program
from ringcompile.ops.slots import BLOCK, Reach
from ringcompile.options import CUDA_GRAPHS
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.cache import reach_of, token_dim
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.distributed import JobRanks
from ringcompile.runtime.inprocess import LockStepRanks
from ringcompile.runtime.join import (
    EXCHANGE_TIMEOUT,
    JOIN_TIMEOUT,
    in_job,
    join_torchrun,
)
from ringcompile.runtime.launcher import LocalRanks
from ringcompile.runtime.local_outputs import share_of_rank
from ringcompile.runtime.outputs import Kept
from ringcompile.runtime.runner import Settings
from ringcompile.runtime.tasks import (
    CARRIED,
    PREFILL,
    WHOLE,
    Driver,
    Extend,
    Prompt,
    Result,
    run_task,
)

_BACKENDS = ("lockstep", "gloo", "nccl", "auto")
# What becomes of a run's outputs.
OUTPUTS = ("whole", "local")


class ProcessOptions(TypedDict, total=False):
    """What may be said of ranks that are processes; see `Session`."""

    nproc: int | None
    threads: int | None
    timeout: float
    join_timeout: float


class Session:
    """Running ranks of a compiled model, which load their weights once and serve many calls.

    `run` computes whole sequences, any number of times. If the model was compiled with a cache,
    `extend` computes the next tokens of a batch of sequences and keeps their keys and values.

    Args:
        parallel: from `transform`, or `load`.
        backend: "lockstep" (all ranks in this process, in turn), "gloo" or "nccl" (one process for
            each rank), or "auto" ("nccl" if there are enough GPUs, otherwise "gloo"). In a torchrun
            job, or if a process group is initialized, this process is one of the ranks: all ranks
            must make the same calls, and rank 0 returns the outputs.
        check_types: check the shape and dtype of every value against its node.
        compiler: a backend of torch.compile, such as "inductor", for fused groups. By default GPUs
            compile them with Inductor when a length comes for the second time.
        check_finite: find the first op, layer and line where NaN or infinity appears.
        cuda_graphs: how the step of one new token runs. "auto" records it as a CUDA graph on GPUs
            and replays that for every token; on CPUs it runs op by op. "off" runs it op by op
            everywhere. "rehearse", for tests on CPUs, records torch's operators and replays them.
        trace: record what each rank does at what time, if ranks are processes; `run` then runs the
            program twice and records the second run.
        processes: for ranks that are processes: `nproc`, the number of ranks, which must be that of
            the mesh; `threads` of each (by default this process' threads are divided over them);
            `timeout`, the seconds that a call may take; `join_timeout`, the seconds until all ranks
            have connected.

    Attributes:
        notes: what the user should know of how the ranks compute, each said as a warning too.

    Raises:
        RingCompileError: an unknown backend, ranks that do not fit together, or that do not join.
    """

    def __init__(
        self,
        parallel: ParallelProgram,
        backend: str = "lockstep",
        *,
        check_types: bool = False,
        compiler: str | None = None,
        check_finite: bool = False,
        trace: bool = False,
        cuda_graphs: str = "auto",
        **processes: Unpack[ProcessOptions],
    ) -> None:
        check_choice("backend", backend, _BACKENDS)
        check_choice("use of CUDA graphs", cuda_graphs, CUDA_GRAPHS)
        for name in processes:
            check_choice("option of a Session", name, tuple(ProcessOptions.__annotations__))
        parallel.ensure_verified()
        self.parallel, self.length = parallel, 0
        self.reach = Reach(False)
        if parallel.carried is not None:
            self.reach = reach_of(parallel.carried.program)
        self.batch: int | None = None  # of the first call of `extend`
        self._until_closed = ExitStack()
        if trace and (backend == "lockstep" or compiler is not None):
            raise RingCompileError(
                "a trace times every op, on ranks that run at the same time",
                hint="use backend='gloo' or 'nccl', and no compiler",
            )
        self.notes: list[str] = []
        settings = Settings(check_types, compiler, check_finite, trace, cuda_graphs)
        self.driver: Driver | None = self._ranks(backend, settings, processes)

    def _ranks(self, backend: str, settings: Settings, processes: ProcessOptions) -> Driver:
        """What runs the ranks: this process, a process of this machine for each, or a job."""
        parallel = self.parallel
        # What a prompt needs of a weight comes first: what a token needs may be a part of it.
        kinds = (WHOLE,) if parallel.carried is None else (PREFILL, CARRIED)
        if parallel.prefill is None:
            kinds = kinds[-1:]
        if backend == "lockstep":
            return LockStepRanks.of(parallel, kinds, settings)
        if in_job():
            rank = join_torchrun(
                parallel.mesh, backend=backend,
                timeout=processes.get("timeout", EXCHANGE_TIMEOUT),
                join_timeout=processes.get("join_timeout", JOIN_TIMEOUT),
            )
            return JobRanks(parallel, rank, kinds, settings)
        if parallel.saved is not None:
            folder, identity = parallel.saved.folder.path, parallel.identity
        else:
            folder, identity = self._until_closed.enter_context(scratch()) / "program", None
            parallel.save(folder)
        return LocalRanks(
            artifact.load, (folder,), kinds, settings=settings, backend=backend,
            identity=identity, **processes,
        )

    def run(self, inputs: Any, *, last: int | None = None, outputs: str = "whole") -> Any:
        """Compute a whole sequence. Tokens that `extend` has computed have no influence on it.

        Args:
            inputs: the model's inputs: a mapping by name, a sequence in order, or one tensor.
            last: compute outputs for this many last positions only; the head is not applied to
                other positions.
            outputs: "whole" gathers the outputs; "local" leaves each rank its share.

        Returns:
            the outputs, nested as the model returns them, or with "local" a list with a `Share`
            for each rank. In a job, rank 0 returns the outputs and other ranks return None; with
            "local" each rank returns a list with its own `Share`.

        Raises:
            RingCompileError: inputs that do not fit, or ranks that fail.
        """
        check_choice("form of outputs", outputs, OUTPUTS)
        if last is not None and last < 1:
            raise RingCompileError(f"last={last}: it must be at least 1")
        found = self.result(inputs, Kept(last), whole=outputs == "whole")
        if outputs == "whole":
            return found.outputs
        return [share_of_rank(self.parallel.rank(run.stats.rank), run, last) for run in found.runs]

    def result(self, inputs: Any, keep: Kept, *, whole: bool = True) -> Result:
        """Run once, for outputs and for what they cost.

        Args:
            inputs: as for `run`.
            keep: what is kept of the outputs.
            whole: whether outputs that are kept are put together.

        Raises:
            RingCompileError: as `run`.
        """
        return self._open().answer(run_task(self.parallel.rank(0), inputs, keep, whole))

    @property
    def program(self) -> Program:
        """The program for the next tokens, as far as it is the same for all ranks.

        Raises:
            RingCompileError: the program was compiled without a cache.
        """
        return self.parallel.with_cache().program

    @property
    def capacity(self) -> int:
        """The tokens that a sequence may have in all; raises as `program`."""
        capacity = self.program.length_range[1]
        assert capacity is not None
        return capacity

    def extend(self, inputs: Any, last: bool = False) -> Any:
        """Compute new tokens after those in the cache: a prompt or a part of it, a turn, a token.

        Args:
            inputs: those of the new tokens only: a mapping by name, a sequence in order, or one
                tensor.
            last: return the output for the last new token only.

        Returns:
            the model's output for the new tokens, such as logits [batch, new tokens, vocabulary],
            or all its outputs, nested as the model returns them.

        Raises:
            RingCompileError: inputs that do not fit, another batch than the session's, more tokens
                than the cache has room for (nothing is taken in), or a rank that fails.
        """
        named = name_inputs(self.program, inputs)
        new = self._new_tokens(named)
        batch = self._check_batch(named)
        if self.length + new > self.capacity:
            raise RingCompileError(
                f"the cache is for {self.capacity} tokens: {self.length} are in it, and {new} "
                "more do not fit",
                hint="compile with a larger cache, or rewind the session",
            )
        self.reach.extend(self.length + new)
        if last and self._divides(new - 1):
            first = {name: x.narrow(dim, 0, new - 1) for name, x, dim in self._along(named)}
            self._open().answer(Prompt({**named, **first}, new - 1))
            self.length, self.batch = new - 1, batch
            rest = {name: x.narrow(dim, new - 1, 1) for name, x, dim in self._along(named)}
            named, new = {**named, **rest}, 1
        found = self._open().answer(Extend(named, new, last))
        self.length, self.batch = self.length + new, batch
        self._note(found)
        leaves, outputs = pytree.tree_leaves(found.outputs), found.outputs
        return leaves[0] if len(leaves) == 1 else outputs

    def _note(self, result: Result) -> None:
        """Say what ranks want the user to know, once."""
        for note in dict.fromkeys(note for run in result.runs for note in run.notes):
            if note not in self.notes:
                self.notes.append(note)
                warnings.warn(note, RingCompileWarning, stacklevel=3)

    @property
    def reports(self) -> bool:
        """Whether this process has the outputs: all but the later ranks of a torchrun job."""
        return self._open().reports

    def _divides(self, prompt: int) -> bool:
        """Whether so many tokens are a prompt that the ranks of a ring divide among them."""
        if self.parallel.prefill is None or self.length:
            return False
        program = self.parallel.prefill.program
        assert program.sequence is not None
        low, high = program.length_range
        return max(low, program.sequence.num_chunks) <= prompt <= (high or prompt)

    def _along(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, int]]:
        """The inputs with an entry for each token, and the dim that it is in."""
        dims = {spec.name: token_dim(spec.type) for spec in self.program.inputs}
        return [(name, x, dim) for name, x in inputs.items() if (dim := dims[name]) is not None]

    def agreed(self, choose: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tokens [batch] that `choose` gives, called once for all ranks."""
        return self._open().agreed(choose, self.batch or 1)

    def rewind(self, length: int) -> None:
        """Remove all tokens after the first `length` from the cache.

        Raises:
            RingCompileError: the cache holds fewer tokens, or the model has convolutions and more
                than 32 tokens would be removed.
        """
        if not 0 <= length <= self.length:
            raise RingCompileError(
                f"cannot go back to {length} tokens: the session has {self.length}"
            )
        if not self.reach.holds(length):
            raise RingCompileError(
                f"cannot go back from {self.reach.highest} tokens to {length}: the state of only "
                f"the last {BLOCK} tokens is kept",
                hint="reset the session and process the first tokens again",
            )
        self._open().rewind(length)
        self.length = length
        self.reach.rewind(length)

    def reset(self) -> None:
        """Remove all tokens from the cache."""
        self.rewind(0)

    def close(self) -> None:
        """Stop the ranks. The session cannot be used afterwards."""
        self._end("close")

    def _end(self, how: str) -> None:
        driver, self.driver = self.driver, None
        with self._until_closed:
            if driver is not None:
                getattr(driver, how)()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end("close" if kind is None else "kill")

    def _open(self) -> Driver:
        if self.driver is None:
            raise RingCompileError("the session is closed", hint="open another one")
        return self.driver

    def _new_tokens(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """How many tokens the inputs bring; at least one, and the same in all of them."""
        counts: dict[str, int] = {}
        for spec in self.program.inputs:
            dim = token_dim(spec.type)
            tensor = inputs[spec.name]
            if tensor.dim() != len(spec.type.shape):
                raise RingCompileError(
                    f"input '{spec.name}' has shape {list(tensor.shape)}, the program takes "
                    f"{len(spec.type.shape)} dims"
                )
            if dim is not None:
                counts[spec.name] = tensor.shape[dim]
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise RingCompileError(
                f"the inputs bring {counts} new tokens",
                hint="pass at least one new token, and as many in every input",
            )
        return next(iter(counts.values()))

    def _check_batch(self, inputs: Mapping[str, torch.Tensor]) -> int:
        """How many sequences the inputs bring: as many in all of them, and in every call."""
        fixed = self.program.batch
        batch = fixed if isinstance(fixed, int) else self.batch
        for spec in self.program.inputs:
            for size, wanted in zip(inputs[spec.name].shape, spec.type.shape, strict=True):
                if wanted != symbol(BATCH):
                    continue
                batch = size if batch is None else batch
                if size != batch:
                    raise RingCompileError(
                        f"input '{spec.name}' has {size} sequences, the session is for {batch}",
                        hint="open another session for another batch",
                    )
        return batch or 1


def check_choice(what: str, given: str, known: tuple[str, ...]) -> None:
    """Raise RingCompileError for a value that is none of those there are."""
    if given not in known:
        raise RingCompileError(f"unknown {what} '{given}'", hint=f"one of: {', '.join(known)}")
