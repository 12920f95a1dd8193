"""A rank's step without its peers: what would arrive comes from memory of its own.

For measuring what a rank computes. The numbers that arrive are noise of the right shape, so outputs
mean nothing; the work is the same, as no op's cost depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ringcompile.mesh import Mesh
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.executor import Replayed, Request, Shift, Wait


@dataclass
class Alone:
    """Answers a rank's requests; see `Executor.run`.

    What a transfer brings stays the same from run to run, as it has to for a recorded CUDA graph.

    Attributes:
        mesh: the mesh that the program was made for.
        device: where the rank computes.
        bytes_sent: what the rank would have sent.
    """

    mesh: Mesh
    device: torch.device
    bytes_sent: int = 0
    arrivals: dict[tuple[torch.dtype, tuple[int, ...], int], torch.Tensor] = field(
        default_factory=dict
    )
    _started: int = 0

    def answer(self, request: Request) -> Any:
        """What the program asks for, at once."""
        match request:
            case Shift():
                return self._start(request)
            case Wait(handle=handle):
                return handle
            case Collective():
                num_ranks = self.mesh.size(request.axis)
                self.bytes_sent += request.num_bytes(num_ranks, 0)
                return _STANDS_IN.get(request.kind, _as_sent)(request, num_ranks)
            case Replayed():
                self.bytes_sent += request.num_bytes
                return None

    def _start(self, shift: Shift) -> torch.Tensor:
        """The arrival, in one of two buffers of its shape, in turn."""
        if shift.to is not None and shift.tensor is not None:
            self.bytes_sent += shift.tensor.nbytes
        shape = shift.shape if shift.source is not None else (0,)
        self._started += 1
        key = shift.dtype, tuple(shape), self._started % 2
        if key not in self.arrivals:
            generator = torch.Generator(self.device).manual_seed(len(self.arrivals))
            noise = torch.randn(shape, generator=generator, device=self.device)
            self.arrivals[key] = noise.to(shift.dtype)
        return self.arrivals[key]


def _as_sent(asked: Collective, num_ranks: int) -> torch.Tensor:
    """What was brought has the shape of what comes; adding up is the network's work."""
    return asked.tensor


_STANDS_IN: dict[str, Callable[[Collective, int], Any]] = {
    "gather": lambda asked, num_ranks: asked.tensor.expand(num_ranks, *asked.tensor.shape),
    "reduce_scatter": lambda asked, num_ranks: asked.tensor[0],
}
