"""Every test here must leave no process and no file behind."""

import multiprocessing.forkserver
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringcompile import held


def ranks_alive() -> list[int]:
    """Process ids of the ranks: the children of the server that forks them."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if server is None:
        return []
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where temporary files go; its path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="rc") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _nothing_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(held, "tempfile", SimpleNamespace(gettempdir=lambda: str(folder)))
    monkeypatch.setenv("RINGCOMPILE_RECORDS", str(folder / "records"))
    yield
    deadline = time.monotonic() + 2
    while ranks_alive() and time.monotonic() < deadline:  # the server reaps them in its own time
        time.sleep(0.01)
    assert ranks_alive() == []
    assert list(folder.glob("ringcompile-run-*")) == []


@pytest.fixture
def within() -> Callable[[float], AbstractContextManager[None]]:
    """Returns `within(seconds)`: its block has to end in time, by an error or not."""

    @contextmanager
    def check(seconds: float) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - started
        assert took < seconds, f"took {took:.1f} s"

    return check
