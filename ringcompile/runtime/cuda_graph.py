"""A rank's step as one CUDA graph: recorded once, then launched as a whole.

A step of a small share is hundreds of kernels of microseconds; launched one by one from Python,
the GPU waits for the host. What a recorded step may not do is look at its data on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringcompile.runtime.drive import drive
from ringcompile.runtime.executor import Executor, Request

_NUM_WARMUPS = 2  # libraries make their handles and workspaces, kernels are compiled


class GraphedStep:
    """A step recorded for inputs of one shape.

    Args:
        executor: the rank's program, prepared for the lengths of these inputs.
        weights: by placeholder name; read where they lie, at every run.
        inputs: this rank's share of the inputs; later ones are copied over them.
        answer: answers requests, while recording only: what it launches is recorded too.

    Raises:
        RingCompileError: an op of the program needs the host, and cannot be recorded.
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
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = drive(executor.run(values), answer)

    def run(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run on inputs of the same shapes; the outputs are overwritten by the next run."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.outputs
