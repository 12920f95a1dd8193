"""A CUDA graph's stand-in on CPUs: what a step did to its tensors is noted, and done again.

Nothing of the step's Python runs when it is replayed. As with a CUDA graph, every operator reads
and writes the memory that it read and wrote when it was recorded, and a number that the host worked
out stays what it was. So a step that would go wrong as a CUDA graph goes wrong here too.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringcompile.runtime.executor import Request, Wait

Requests = Generator[Request, Any, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class _Op:
    """One operator: what it was called with, and where its results are kept."""

    function: Any
    args: Any
    kwargs: Any
    result: Any

    def again(self) -> None:
        """Compute the same results in the same memory."""
        made = self.function(*self.args, **self.kwargs)
        _overwrite(self.result, made, self.args, self.kwargs)


@dataclass(frozen=True)
class _Exchange:
    """What was asked of other ranks, and what they answered."""

    request: Request
    answer: Any


class _Notes(TorchDispatchMode):
    def __init__(self, done: list[_Op | _Exchange]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done = done

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.done.append(_Op(func, args, kwargs, result))
        return result


class Rehearsed:
    """What one run of a program did, as far as operators of torch did it."""

    exchanges_within = False

    def __init__(self) -> None:
        self.done: list[_Op | _Exchange] = []
        self.outputs: tuple[torch.Tensor, ...] = ()

    def record(self, run: Requests) -> Requests:
        """Run to the end, and note what is done; whoever drives this answers the requests."""
        notes, answer = _Notes(self.done), None
        while True:
            try:
                with notes:
                    request = run.send(answer)
            except StopIteration as ended:
                self.outputs = ended.value
                return self.outputs
            answer = yield request
            self.done.append(_Exchange(request, answer))

    def replay(self) -> Requests:
        """Do the same again; the outputs are the same tensors, written anew."""
        handles: dict[int, Any] = {}
        for step in self.done:
            if isinstance(step, _Op):
                step.again()
                continue
            request = step.request
            if isinstance(request, Wait):
                request = replace(request, handle=handles[id(request.handle)])
            answer = yield request
            handles[id(step.answer)] = answer
            _overwrite(step.answer, answer)
        return self.outputs


def _overwrite(kept: Any, made: Any, *read: Any) -> None:
    """Copy new results over those that are kept, but for views of what was read."""
    known = {_memory(x) for x in tree_leaves(read) if isinstance(x, torch.Tensor)}
    for old, new in zip(tree_leaves(kept), tree_leaves(made), strict=True):
        if isinstance(old, torch.Tensor) and _memory(old) not in known:
            old.copy_(new)


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
