"""How a CUDA graph is recorded, with torch's own recording replaced: there need be no GPU."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from ringcompile.errors import RingCompileError
from ringcompile.runtime.alone import Alone
from ringcompile.runtime.cuda_graph import CudaGraph, NotRecordedError
from ringcompile.runtime.drive import drive
from ringcompile.runtime.runner import OpenWeights, Runner, Settings, computed
from ringcompile.runtime.tasks import Extend
from tests.generate.models import Rotary, cached, ids

CPU = torch.device("cpu")


class Recorder:
    """What was done, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def replay(self) -> None:
        self.events.append("replay")

    @contextmanager
    def graph(self, graph: Any, **how: Any) -> Iterator[None]:
        assert how["capture_error_mode"] == "thread_local"
        self.events.append("begin")
        try:
            yield
        finally:
            self.events.append("end")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    graph = type("CUDAGraph", (), {"__new__": lambda cls: made})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_exchanges_are_recorded_too(recorder: Recorder) -> None:
    def run() -> Generator[Any, Any, tuple[torch.Tensor, ...]]:
        recorder.events.append("computes")
        answer = yield "asks"
        return (answer,)

    def answer(request: Any) -> torch.Tensor:
        recorder.events.append("is answered")
        return torch.ones(1)

    graph = CudaGraph(CPU)
    outputs = drive(graph.record(run()), answer)
    assert recorder.events == ["begin", "computes", "is answered", "end", "replay"]
    assert drive(graph.replay(), answer) is outputs
    assert recorder.events[5:] == ["replay"]


@pytest.mark.parametrize("error", [
    RuntimeError("operation not permitted when stream is capturing\nmore of it"),
    RingCompileError("operation not permitted when stream is capturing", hint="never mind"),
], ids=["of torch", "with a node"])
def test_what_cannot_be_recorded(recorder: Recorder, error: Exception) -> None:
    def run() -> Generator[Any, Any, Any]:
        raise error
        yield

    with pytest.raises(NotRecordedError) as raised:
        drive(CudaGraph(CPU).record(run()), lambda request: None)
    assert str(raised.value) == "operation not permitted when stream is capturing"
    assert recorder.events == ["begin", "end"]


@torch.no_grad()
def test_what_a_replay_sends_is_counted(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks its driver for nothing, and sends as many bytes as every other step."""
    parallel = cached(Rotary, "ring=2")[1].carried
    monkeypatch.setattr("ringcompile.runtime.decode_step.Rehearsed", lambda: CudaGraph(CPU))
    runner = Runner(
        lambda kind: parallel.rank(0), OpenWeights(parallel.source, CPU),
        Settings(cuda_graphs="rehearse"),
    )
    alone, sent = Alone(parallel.mesh, CPU), []
    for _ in range(4):
        drive(computed(runner.prepare(Extend({"ids": ids(1)}, 1))), alone.answer)
        sent.append(alone.bytes_sent - sum(sent))
    assert recorder.events == ["begin", "end", "replay", "replay", "replay"]
    assert sent[0] > 0
    assert sent == [sent[0]] * 4
