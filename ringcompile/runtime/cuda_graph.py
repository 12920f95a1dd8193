"""What a rank's program does on a GPU as one CUDA graph: recorded once, then launched as a whole.

A step of a small share is hundreds of kernels of microseconds; launched one by one from Python,
the GPU waits for the host. What a recorded step may not do is look at its data on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.runtime.drive import drive
from ringcompile.runtime.executor import Executor, Request

Requests = Generator[Request, Any, tuple[torch.Tensor, ...]]


class NotRecordedError(Exception):
    """A run could not be recorded. Nothing was computed, and nothing sent."""


class CudaGraph:
    """One run of a program, as a CUDA graph.

    Args:
        device: where it runs.
        pool: memory that several graphs share, of which one is replayed at a time.
    """

    exchanges_within = True

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.device, self.pool = device, pool
        self.graph, self.outputs = torch.cuda.CUDAGraph(), tuple[torch.Tensor, ...]()

    def record(self, run: Requests) -> Requests:
        """Record a run, then compute it. Its requests have to be answered as they come.

        What answers them is recorded as well: that of NCCL, with peers that record the same.

        Raises:
            NotRecordedError: an op needs the host, or does not go into a graph.
        """
        try:
            # Other threads, such as NCCL's watchdog, may ask the device what they like.
            with torch.cuda.device(self.device), torch.cuda.graph(
                self.graph, pool=self.pool, capture_error_mode="thread_local"
            ):
                self.outputs = yield from run
        except (RuntimeError, RingCompileError) as error:
            raise NotRecordedError(_first_line(error)) from error
        return (yield from self.replay())

    def replay(self) -> Requests:
        """Compute again, on what is in the memory that was read; outputs are written anew."""
        self.graph.replay()
        return self.outputs
        yield  # it asks for nothing


def _first_line(error: Exception) -> str:
    text = error.message if isinstance(error, RingCompileError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


_NUM_WARMUPS = 2  # libraries make their handles and workspaces, kernels are compiled


class GraphedStep:
    """A step recorded for inputs of one shape.

    Args:
        executor: the rank's program, prepared for the lengths of these inputs.
        weights: by placeholder name; read where they lie, at every run.
        inputs: this rank's share of the inputs; later ones are copied over them.
        answer: answers requests, while recording only: what it launches is recorded too.

    Raises:
        NotRecordedError: an op of the program needs the host, and cannot be recorded.
    """

    def __init__(
        self,
        executor: Executor,
        weights: dict[str, torch.Tensor],
        inputs: dict[str, torch.Tensor],
        answer: Callable[[Request], Any],
    ) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        values = {**weights, **self.inputs}
        with torch.no_grad(), torch.cuda.device(executor.device):
            # Not on the stream that records: there, warming up would become part of the graph.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_NUM_WARMUPS):
                    drive(executor.run(values), answer)
            torch.cuda.current_stream().wait_stream(side)
            self.recorded = CudaGraph(executor.device)
            drive(self.recorded.record(executor.run(values)), answer)

    def replay(self) -> tuple[torch.Tensor, ...]:
        """Run on the inputs that were copied last."""
        self.recorded.graph.replay()
        return self.recorded.outputs

    def run(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run on inputs of the same shapes; the outputs are overwritten by the next run."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        return self.replay()
