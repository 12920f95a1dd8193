"""A sequence that grows: ranks that keep weights and cache, and take new tokens call by call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from ringcompile.artifact import load_carried, load_prefill
from ringcompile.errors import RingCompileError
from ringcompile.held import scratch
from ringcompile.ir.expr import BATCH, symbol
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.cache import token_dim
from ringcompile.runtime.carried import Driver, JobDriver, LockStepDriver, ProcessDriver
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.join import in_job, join_torchrun

# What runs the ranks.
_DRIVERS: dict[str, Callable[..., Driver]] = {
    "lockstep": lambda parallel, check_types: LockStepDriver(
        parallel.with_cache(), parallel.prefill, check_types
    ),
    "gloo": lambda parallel, check_types: _processes(parallel, "gloo"),
    "nccl": lambda parallel, check_types: _processes(parallel, "nccl"),
    "auto": lambda parallel, check_types: _processes(parallel, "auto"),
}


def _processes(parallel: ParallelProgram, backend: str) -> Driver:
    """A process for each rank, which reads its program and weights from an artifact.

    Under torchrun, or where the caller has initialised a process group, the processes are there
    already: this one is a rank of the job.
    """
    if in_job():
        rank = join_torchrun(parallel.mesh, backend=backend)
        return JobDriver(parallel.with_cache(), rank, parallel.prefill)
    prompts = None if parallel.prefill is None else load_prefill
    if parallel.saved is not None:
        folder, identity = parallel.saved.folder.path, parallel.identity
        return ProcessDriver(
            load_carried, (folder,), prompts, backend=backend, identity=identity
        )
    with scratch() as temporary:
        parallel.save(temporary / "program")
        folder = temporary / "program"
        return ProcessDriver(load_carried, (folder,), prompts, backend=backend)


class Session:
    """The ranks of a program with a cache, and one batch of sequences that grow.

    Args:
        parallel: from `transform` with `cache`, or `load`.
        backend: "lockstep" (all ranks in this process), "gloo" or "nccl" (a process for each), or
            "auto", the latter of them where there are enough GPUs. Under torchrun a process is one
            rank of its job: all of them make the same calls, and rank 0 has the outputs.
        check_types: hold every value against the type that its node declares, in lock-step.

    Raises:
        RingCompileError: the program has no cache, or ranks that do not join.
    """

    def __init__(
        self, parallel: ParallelProgram, backend: str = "lockstep", *, check_types: bool = False
    ) -> None:
        carried = parallel.with_cache()
        if backend not in _DRIVERS:
            raise RingCompileError(
                f"unknown backend '{backend}'", hint=f"backends: {', '.join(_DRIVERS)}"
            )
        parallel.ensure_verified()
        self.program: Program = carried.program
        self.prefill = None if parallel.prefill is None else parallel.prefill.program
        capacity = self.program.length_range[1]
        assert capacity is not None
        self.capacity, self.length = capacity, 0
        # Of the first call, where the program is for any batch.
        self.batch = self.program.batch if isinstance(self.program.batch, int) else None
        self.driver: Driver | None = _DRIVERS[backend](parallel, check_types)

    def extend(self, inputs: Any, last: bool = False) -> Any:
        """Take in new tokens: a prompt, a part of a long one, the next turn, the next token.

        Args:
            inputs: for the new tokens only; a mapping by name, a sequence in order, or one tensor.
            last: return what belongs to the last of the new tokens only.

        Returns:
            the model's output for the new tokens, such as logits [batch, new tokens, vocabulary];
            nested as the model returns them where there are several.

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
        if last and self._divides(new - 1):
            first = {name: x.narrow(dim, 0, new - 1) for name, x, dim in self._along(named)}
            self._open().prompt({**named, **first}, new - 1)
            self.length, self.batch = new - 1, batch
            rest = {name: x.narrow(dim, new - 1, 1) for name, x, dim in self._along(named)}
            named, new = {**named, **rest}, 1
        outputs = self._open().extend(named, new, last)
        self.length, self.batch = self.length + new, batch
        leaves = pytree.tree_leaves(outputs)
        return leaves[0] if len(leaves) == 1 else outputs

    @property
    def reports(self) -> bool:
        """Whether this process has the outputs: all but the later ranks of a torchrun job."""
        return not isinstance(self.driver, JobDriver) or self.driver.rank.index == 0

    def _divides(self, prompt: int) -> bool:
        """Whether so many tokens are a prompt that the ranks of a ring divide among them."""
        if self.prefill is None or self.length:
            return False
        assert self.prefill.sequence is not None
        low, high = self.prefill.length_range
        return max(low, self.prefill.sequence.num_chunks) <= prompt <= (high or prompt)

    def _along(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, int]]:
        """The inputs with an entry for each token, and the dim that it is in."""
        dims = {spec.name: token_dim(spec.type) for spec in self.program.inputs}
        return [(name, x, dim) for name, x in inputs.items() if (dim := dims[name]) is not None]

    def agreed(self, choose: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tokens [batch] that `choose` gives, called once for all ranks."""
        return self._open().agreed(choose, self.batch or 1)

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`.

        Raises:
            RingCompileError: there are not so many.
        """
        if not 0 <= length <= self.length:
            raise RingCompileError(
                f"cannot go back to {length} tokens: the session has {self.length}"
            )
        self._open().rewind(length)
        self.length = length

    def reset(self) -> None:
        """Forget all tokens."""
        self.rewind(0)

    def close(self) -> None:
        """End the ranks; the session cannot be used any more."""
        if self.driver is not None:
            self.driver.close()
        self.driver = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
        batch = self.batch
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
