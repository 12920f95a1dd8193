"""A sequence that grows: ranks that keep weights and cache, and take new tokens call by call."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.utils import _pytree as pytree

from ringcompile.compiler import ParallelProgram
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.runtime.batches import deal, whole_outputs
from ringcompile.runtime.cache import Memory, token_dim
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.inprocess import read_all_weights
from ringcompile.runtime.lockstep import LockStep

Inputs = dict[str, torch.Tensor]


class Driver(Protocol):
    """Runs the ranks of a session."""

    def extend(self, inputs: Inputs, new: int) -> Any:
        """Whole outputs for new tokens, nested as the model returns them."""

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""

    def close(self) -> None:
        """End the ranks."""


class LockStepDriver:
    """All ranks in this process."""

    def __init__(self, carried: ParallelProgram, check_types: bool = False) -> None:
        self.mesh, self.programs = carried.mesh, carried.ranks()
        self.weights = list(read_all_weights(self.programs, carried.source))
        self.memories = [Memory(program) for program in self.programs]
        self.executors: dict[int, list[Executor]] = {}
        self.check_types, self.bytes_sent = check_types, [0] * len(self.programs)

    @torch.no_grad()
    def extend(self, inputs: Inputs, new: int) -> Any:
        """Run all ranks on their part of the batch."""
        dealt = deal(self.programs[0], inputs)
        lengths = self.programs[0].bindings(dealt.hands[0][0])
        if new not in self.executors:
            if len(self.executors) == _MAX_EXECUTORS:
                self.executors.clear()
            self.executors[new] = [
                Executor(program, lengths, check_types=self.check_types)
                for program in self.programs
            ]
        generators = [
            executor.run({**weights, **memory.begin(dealt.of(memory.program)[0], new)})
            for executor, weights, memory in zip(
                self.executors[new], self.weights, self.memories, strict=True
            )
        ]
        results, self.bytes_sent = LockStep(self.mesh).run(generators)
        return whole_outputs(self.programs[-1], [[result] for result in results], lengths)

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on, on every rank."""
        for memory in self.memories:
            memory.rewind(length)

    def close(self) -> None:
        """Let weights and cache go."""
        self.weights, self.memories = [], []


_MAX_EXECUTORS = 16  # one for each number of new tokens lately seen
_DRIVERS: dict[str, Any] = {"lockstep": LockStepDriver}


class Session:
    """The ranks of a program with a cache, and one batch of sequences that grow.

    Args:
        parallel: from `transform` with `cache`, or `load`.
        backend: "lockstep" (all ranks in this process), "gloo" or "nccl" (a process for each).

    Raises:
        RingCompileError: the program has no cache, or ranks that do not join.
    """

    def __init__(self, parallel: ParallelProgram, backend: str = "lockstep") -> None:
        if parallel.carried is None:
            raise RingCompileError(
                "the program was compiled without a cache",
                hint="pass cache=N to transform, or --cache N on the command line",
            )
        if backend not in _DRIVERS:
            raise RingCompileError(
                f"unknown backend '{backend}'", hint=f"backends: {', '.join(_DRIVERS)}"
            )
        self.program: Program = parallel.carried.program
        capacity = self.program.length_range[1]
        assert capacity is not None
        self.capacity, self.length = capacity, 0
        self.batch = self.program.batch * parallel.mesh.size("dp")
        self.driver: Driver | None = _DRIVERS[backend](parallel.carried)

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
        self._check_batch(named)
        if self.length + new > self.capacity:
            raise RingCompileError(
                f"the cache is for {self.capacity} tokens: {self.length} are in it, and {new} "
                "more do not fit",
                hint="compile with a larger cache, or rewind the session",
            )
        outputs = self._open().extend(named, new)
        self.length += new
        leaves = pytree.tree_leaves(outputs)
        if last:
            outputs = pytree.tree_map(lambda x: _last(x, new), outputs)
        return pytree.tree_leaves(outputs)[0] if len(leaves) == 1 else outputs

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

    def _check_batch(self, inputs: Mapping[str, torch.Tensor]) -> None:
        for spec in self.program.inputs:
            shape, wanted = inputs[spec.name].shape, spec.type.shape
            if len(wanted) > 1 and wanted[0] == self.program.batch and shape[0] != self.batch:
                raise RingCompileError(
                    f"input '{spec.name}' has {shape[0]} sequences, the session is for "
                    f"{self.batch}",
                    hint="capture the model with the batch that is to be generated",
                )


def _last(x: torch.Tensor, new: int) -> torch.Tensor:
    """The last token of an output [batch, new tokens, ...]."""
    return x[:, -1:] if x.dim() > 1 and x.shape[1] == new else x
