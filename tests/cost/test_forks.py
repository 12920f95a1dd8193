"""Calls in forked processes: results in order, faults as faults, nothing left behind."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from ringcompile.cost import forks
from ringcompile.errors import RingCompileError, SourceLocation


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_processors", lambda: 2)


def test_in_other_processes_and_in_order() -> None:
    seen: list[int] = []

    def call(item: int) -> tuple[int, int]:
        seen.append(item)  # a closure need not be sent; what it changes stays where it ran
        return item, os.getpid()

    found = forks.mapped(call, range(20))
    assert [item for item, _ in found] == list(range(20))
    assert os.getpid() not in {process for _, process in found}
    assert not seen


@pytest.mark.parametrize("items", [[], [3]])
def test_one_call_needs_no_process(items: list[int]) -> None:
    found = forks.mapped(lambda item: (item, os.getpid()), items)
    assert found == [(item, os.getpid()) for item in items]


def test_without_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_processors", lambda: 1)
    assert set(forks.mapped(lambda _: os.getpid(), range(3))) == {os.getpid()}


def test_calls_within_calls() -> None:
    found = forks.mapped(lambda i: forks.mapped(lambda j: i * j, range(3)), range(3))
    assert found == [[0, 0, 0], [0, 1, 2], [0, 2, 4]]


def test_threads_of_torch_do_not_hang() -> None:
    """The pool of the parent does not outlive the fork; enough work to be shared out."""
    torch.ones(1 << 20).add(1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).add(1.0)
        found = forks.mapped(lambda i: float(torch.ones(1 << 20).add(i).sum()), range(2))
    finally:
        torch.set_num_threads(threads)
    assert found == [float(1 << 20), float(2 << 20)]


def test_an_error_arrives_whole() -> None:
    error = RingCompileError("no", hint="yes", location=SourceLocation("f.py", 3, "m"), node="n")
    (found, _) = forks.mapped(lambda _: error, range(2))
    assert vars(found) == vars(error)

    def fail(item: int) -> None:
        raise error

    with pytest.raises(RingCompileError) as raised:
        forks.mapped(fail, range(2))
    assert str(raised.value) == str(error)
    assert raised.value.location == error.location


def test_a_process_that_is_ended() -> None:
    def end(item: int) -> None:
        if item:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RingCompileError, match="one of 2 compiling processes was killed"):
        forks.mapped(end, range(4))
