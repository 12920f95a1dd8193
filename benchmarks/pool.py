"""Persistent worker processes that take turns: what every benchmark here measures with.

The machine is shared and noisy, so nothing is measured in a row: all processes start first and
stay, and single steps of the contestants alternate. An idle worker blocks on its pipe.
"""

import datetime
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

# Far above any step measured here; reached only when a rank died, which must not become a hang.
TIMEOUT_SECONDS = 300

Step = Callable[[], torch.Tensor]
Setup = Callable[[int, int, Any], Step]


@dataclass(frozen=True)
class Timing:
    """Wall seconds from the first rank's start to the last one's end; CPU seconds of all ranks."""

    seconds: float
    cpu_seconds: float


class Pool:
    """`world` processes of `num_threads` threads, joined by gloo over loopback when `world` > 1."""

    def __init__(self, world: int, num_threads: int):
        # With torch inside the forkserver, workers start in a moment and share its pages.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, num_threads, self._folder.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            # Our copy of the worker's end: left open, a dead worker would never read as closed.
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()

    def load(self, name: str, setup: Setup, case: Any) -> None:
        """Have every rank call `setup(rank, world, case)` and keep its step under `name`."""
        self._ask("load", name, setup, case)

    def output(self, name: str) -> list[torch.Tensor]:
        """Run one step and return each rank's result; also the warm-up."""
        return [torch.from_numpy(array) for array in self._ask("output", name)]

    def time(self, name: str) -> Timing:
        """Run one step on all ranks together, the result thrown away."""
        starts, ends, cpu_seconds = zip(*self._ask("time", name), strict=True)
        # The clock is the same in all processes of a machine.
        return Timing(max(ends) - min(starts), sum(cpu_seconds))

    def _ask(self, *request: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(request)
        return [self._answer(pipe) for pipe in self._pipes]

    def _answer(self, pipe: Connection) -> Any:
        if not pipe.poll(TIMEOUT_SECONDS):
            raise TimeoutError(f"a benchmark worker gave no answer for {TIMEOUT_SECONDS} s")
        try:
            fault, answer = pipe.recv()
        except EOFError:
            raise RuntimeError("a benchmark worker died") from None
        if fault:
            raise RuntimeError(f"a benchmark worker failed:\n{fault}")
        return answer


def _serve(rank: int, world: int, num_threads: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(False)
    if world > 1:
        _join(rank, world, Path(folder) / "store")
    steps: dict[str, Step] = {}
    while True:
        try:
            action, name, *rest = pipe.recv()
        except EOFError:
            return
        try:
            if action == "load":
                setup, case = rest
                steps[name] = setup(rank, world, case)
                answer = None
            else:
                answer = _ACTIONS[action](steps[name], world)
            pipe.send((None, answer))
        except Exception:
            pipe.send((traceback.format_exc(), None))


def _join(rank: int, world: int, store: Path) -> None:
    # gloo would take the interface of the host's name; nothing here may be reached from outside.
    os.environ["GLOO_SOCKET_IFNAME"] = next(
        name for _, name in socket.if_nameindex() if name.startswith("lo")
    )
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )


def _output(step: Step, world: int) -> Any:
    # As an array: a tensor would travel as a shared-memory handle that must outlive this process.
    return step().numpy()


def _time(step: Step, world: int) -> tuple[float, float, float]:
    if world > 1:
        dist.barrier()
    cpu_start, start = time.process_time(), time.perf_counter()
    step()
    end, cpu_end = time.perf_counter(), time.process_time()
    return start, end, cpu_end - cpu_start


_ACTIONS = {"output": _output, "time": _time}
