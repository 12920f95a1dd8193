"""Steps of one new token at fixed shapes: recorded once, then replayed for token after token.

What a step depends on lies in memory that stays where it is: weights, caches, the new token, and,
as numbers on the device, its position, its slot and the positions of all slots (`cache.Memory`).
Only attention over a cache has a size that grows, the slots in use. Here it is a bucket's, of which
masks hide the rest; each bucket has a recording of its own.

Every step exchanges messages once on every rank, whether it runs op by op, is recorded or replayed.
So no rank depends on what another one does, and each falls back to single ops on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import bind, depends_on_data
from ringcompile.ir.nodes import location_of, results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ops.schemas import name_of
from ringcompile.runtime.cuda_graph import CudaGraph, NotRecordedError
from ringcompile.runtime.executor import Executor, Replayed, Request
from ringcompile.runtime.needs_host import HostWatch
from ringcompile.runtime.rehearsal import Rehearsed

Inputs = dict[str, torch.Tensor]
Requests = Generator[Request, Any, tuple[torch.Tensor, ...]]
# Ranks exchange as many rows as there are for each: the host has to know how many.
_COUNTED = frozenset({"dispatch", "combine"})
# What a call brings. All other state lies where it lies.
_BROUGHT = frozenset({None, "positions", "slots"})


class Recording(Protocol):
    """A run that can be done again: `CudaGraph`, or `Rehearsed` on CPUs.

    Attributes:
        exchanges_within: whether a replay exchanges with other ranks on its own.
    """

    exchanges_within: bool

    def record(self, run: Requests, /) -> Requests:
        """Record a run, and compute it once.

        Raises:
            NotRecordedError: it cannot be recorded, and nothing was computed.
        """

    def replay(self) -> Requests:
        """Compute it again, on what is now in memory; outputs are written anew."""


def recorder(how: str, device: torch.device) -> Callable[[], Recording] | None:
    """What makes empty recordings on a device; None where steps are not recorded.

    Args:
        how: one of `options.CUDA_GRAPHS`.
        device: where steps run.

    Raises:
        RingCompileError: a rehearsal on a GPU, where torch's operators are not all that runs.
    """
    if how == "rehearse":
        if device.type == "cuda":
            raise RingCompileError(
                "cuda_graphs='rehearse' is for ranks on CPUs", hint="use backend='gloo'"
            )
        return Rehearsed
    if how == "off" or device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(device, pool)


class DecodeSteps:
    """The steps of one new token of a rank, for every bucket of slots.

    Args:
        program: the rank's, for the next tokens.
        weights: by placeholder.
        executors: for these lengths, one that checks and then, with a compiler, the compiled one.
        recording: makes an empty one.
        refusal: why steps cannot be recorded, if that is known already.

    Attributes:
        refusal: why tokens are computed op by op, with a length that grows; None while they are
            not.
        watched: whether a step was watched: what needs the host does so in every bucket.
    """

    def __init__(
        self,
        program: Program,
        weights: Inputs,
        executors: Callable[[dict[str, int]], list[Executor]],
        recording: Callable[[], Recording],
        refusal: str | None = None,
    ) -> None:
        self.program, self.weights = program, weights
        self.executors, self.recording = executors, recording
        self.refusal, self.watched = refusal or why_not_fixed(program), False
        self._made: dict[Any, BucketStep] = {}
        # The placeholder whose size is the bucket's, and the symbol for it; none without attention.
        self._sizes = {node.name: str(type_of(node).shape[0]) for node in program.graph.nodes
                       if program.state.get(node.name) == "places"}
        self._buffers: Inputs = {}

    def step(self, lengths: dict[str, int], values: Inputs, device: torch.device) -> BucketStep:
        """The step for a bucket, which takes these values.

        Args:
            lengths: of the call.
            values: what the program reads besides weights, from `Memory.begin` with `fixed`.
            device: where it runs.
        """
        known = {**lengths, **{size: len(values[name]) for name, size in self._sizes.items()}}
        key = tuple(sorted(known.items()))
        if key not in self._made:
            self._made[key] = BucketStep(self, known, values, device)
        return self._made[key]

    def brings(self, name: str) -> bool:
        """Whether the value of a placeholder comes with every call."""
        return self.program.state.get(name) in _BROUGHT

    def buffer(self, name: str, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Memory for a value that comes with every call, for all buckets."""
        known = self._buffers.get(name)
        if known is None or known.shape != value.shape:
            known = self._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        return known


class BucketStep:
    """A step of one new token for one bucket; it is run like an `Executor`."""

    def __init__(
        self, steps: DecodeSteps, lengths: dict[str, int], values: Inputs, device: torch.device
    ) -> None:
        self.steps, self.program = steps, steps.program
        self._before = steps.executors(lengths)
        self.executor = self._before[-1]
        self.lengths = self.executor.lengths
        self.recording: Recording | None = None
        known = {**self.program.lengths, **self.lengths}
        self._num_bytes = int(bind(bytes_sent(self.program), known))
        self.held = {
            **steps.weights,
            **{name: steps.buffer(name, x, device) if steps.brings(name) else x
               for name, x in values.items()},
        }

    def run(self, values: Inputs) -> Requests:
        """Compute one token; see `Executor.run`.

        Args:
            values: as `DecodeSteps.step` takes them.
        """
        for name, value in values.items():
            if self.steps.brings(name):
                self.held[name].copy_(value)
            else:
                assert self.held[name].data_ptr() == value.data_ptr(), f"{name} has moved"
        outputs = yield from self._run()
        return tuple(x.clone() for x in outputs)

    def _run(self) -> Requests:
        if self.recording is not None:
            if self.recording.exchanges_within:
                yield Replayed("a recorded step", self._num_bytes)
            return (yield from self.recording.replay())
        if self._before:
            return (yield from self._warm_up(self._before.pop(0)))
        recording = self.steps.recording()
        try:
            outputs = yield from recording.record(self.executor.run(self.held))
        except NotRecordedError as error:
            self.steps.refusal = f"the step could not be recorded: {error}"
            return (yield from self.executor.run(self.held))
        self.recording = recording
        return outputs

    def _warm_up(self, executor: Executor) -> Requests:
        """Op by op: kernels are loaded, and in the first bucket what needs the host is seen."""
        executor.watch = watch = None if self.steps.watched else HostWatch()
        outputs = yield from executor.run(self.held)
        executor.watch, self.steps.watched = None, True
        if watch is not None and watch.found is not None:
            node, what = watch.found
            self.steps.refusal = _at(node, f"{what} needs the host")
        return outputs


def why_not_fixed(program: Program) -> str | None:
    """Why the step of one token cannot have fixed shapes; None if it can."""
    for node in program.graph.nodes:
        if name_of(node.target) in _COUNTED:
            return _at(node, "how many rows go to each rank depends on the data")
        if program.state.get(node.name) == "places" or "type" not in node.meta:
            continue
        if any(depends_on_data(size) for type_ in results_of(node) for size in type_.shape):
            return _at(node, f"the size of {node.target} depends on the data")
    return None


def _at(node: fx.Node, why: str) -> str:
    """A reason with the user's line and layer."""
    where = location_of(node)
    line = f"{where}: " if where.file else ""
    layer = f", layer {where.layer}" if where.layer else ""
    return f"{line}{why} (%{node.name}{layer})"
