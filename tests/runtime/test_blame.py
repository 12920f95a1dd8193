"""When a run ends badly, the rank to blame is named alone, and what others did last is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch

from ringcompile import compiler
from ringcompile.errors import RingCompileError
from ringcompile.models import zoo
from ringcompile.runtime.launcher import launch
from ringcompile.runtime.processes import Processes
from ringcompile.runtime.recorder import KEPT, Recorder
from ringcompile.runtime.reports import slow_rank
from ringcompile.runtime.tasks import Stats
from ringcompile.session import Session
from tests.runtime import rank_functions
from tests.support import zoo_program


def test_a_stopped_rank_is_named_alone(within) -> None:
    message = (r"model.py:7: error: rank 2 did not answer within 6 s while others waited for it\n"
               r"  node: %arrived\n  layer: layers.0\n  hint: rank 2 is stopped \(SIGSTOP")
    with within(150), pytest.raises(RingCompileError, match=message):
        launch(rank_functions.stop_in_the_ring, 4, timeout=6, threads=1)


def test_all_that_still_run_name_the_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that waited for one that waited for it; with the op and the user's line."""
    monkeypatch.setenv("RINGCOMPILE_RECORDS", str(tmp_path))
    with Processes(4, timeout=6, threads=1) as ranks:
        said = ranks.call(rank_functions.miss_one, 1, timeout=60)
    for index, text in enumerate(said):
        if index == 1:
            assert text == ""
            continue
        assert re.search(rf"model.py:7: error: rank {index} lost rank 1 in %arrived: ", text), text
        assert "node: %arrived" in text
        assert "layer: layers.0" in text
        assert f"what this rank did last is in {tmp_path}/rank{index}.json" in text
        rows = json.loads((tmp_path / f"rank{index}.json").read_text())
        assert rows[-1]["state"] == "failed"
        assert rows[-1]["kind"] == "wait"
        assert rows[-2] | {"started": 0, "seconds": 0} == {
            "kind": "shift", "node": "t", "peers": sorted({(index + 1) % 4, (index - 1) % 4}),
            "num_bytes": 12, "started": 0, "seconds": 0, "state": "done",
        }


def test_a_recorder_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGCOMPILE_RECORDS", str(tmp_path / "new"))
    recorder = Recorder(3)
    for i in range(KEPT + 20):
        recorder.begin("gather", f"n{i}", [3, 1, 1], i).end("done")
    recorder.begin("shift", "last", [], 0)
    path = recorder.write()
    assert path == tmp_path / "new" / "rank3.json"
    rows = json.loads(path.read_text())
    assert len(rows) == KEPT
    assert rows[0]["node"] == "n21"
    assert rows[0]["peers"] == [1]
    assert (rows[-1]["state"], rows[-1]["seconds"]) == ("started", None)
    assert path.stat().st_mode & 0o077 == 0


def test_records_are_not_written_through_what_others_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGCOMPILE_RECORDS", str(tmp_path))
    (tmp_path / "rank0.json").symlink_to(tmp_path / "precious")
    assert Recorder(0).write() is None
    assert not (tmp_path / "precious").exists()


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "out"
    compiler.transform(zoo_program("llama-tiny"), "ring=2", cache=4096).save(folder)
    return folder


def test_a_slow_rank_is_named_and_left_alone(cached: Path) -> None:
    _, inputs = zoo.build("llama-tiny", sequence=12)
    stats = launch(rank_functions.run_slowly, 2, (str(cached), 1, inputs), threads=1)[0]
    said = slow_rank(stats)
    assert re.fullmatch(
        r"rank 1 computed for \d+\.\d\d s and every other rank for at most \d+\.\d\d s, so they "
        r"waited for it", said), (said, stats)


@pytest.mark.parametrize(
    ("times", "rank"),
    [([(9.0, 8.0), (9.0, 0.1), (9.0, 7.5)], 1), ([(3.0, 0.1), (3.0, 2.0)], 0),
     ([(9.0, 0.1), (9.0, 0.2)], None), ([(0.30, 0.29), (0.30, 0.0)], None),
     ([(3.0, 0.0), (3.0, 1.4)], None), ([(5.0, 0.0)], None)],
)
def test_a_rank_is_slow_only_where_all_others_waited(
    times: list[tuple[float, float]], rank: int | None
) -> None:
    said = slow_rank([Stats(i, 0, *both, 0) for i, both in enumerate(times)])
    assert said.startswith(f"rank {rank} computed") if rank is not None else not said


ENDS = {
    signal.SIGKILL: r"rank 1 was killed by SIGKILL{}.*hint: SIGKILL is often the system out of",
    signal.SIGTERM: r"rank 1 was killed by SIGTERM{}.*hint: a person, a scheduler or a time limit",
    signal.SIGSTOP: r"rank 1 did not answer within 20 s{}.*hint: rank 1 is stopped \(SIGSTOP",
}


def _work(session: Session, ids: torch.Tensor, decodes: bool, worked: threading.Event) -> None:
    for i in range(4000):
        if i == 3:
            worked.set()
        if decodes:
            session.extend(ids[:, :1])
        else:
            session.run(ids)


@pytest.mark.parametrize(
    ("number", "decodes"),
    [(signal.SIGKILL, True),
     *(pytest.param(*row, marks=pytest.mark.slow) for row in (
         (signal.SIGTERM, True), (signal.SIGSTOP, True), (signal.SIGKILL, False),
         (signal.SIGTERM, False), (signal.SIGSTOP, False)))],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else
    ("decoding" if value else "running"),
)
def test_a_rank_that_ends_while_it_works_is_named_alone(
    cached: Path, number: signal.Signals, decodes: bool
) -> None:
    """After some calls, whenever the machine comes to them; no rank and no folder stays."""
    made, ids = compiler.load(cached), torch.arange(12)[None]
    worked = threading.Event()
    timeout = 20.0 if number == signal.SIGSTOP else 300.0
    with Session(made, "gloo", threads=1, timeout=timeout) as session:
        victim = rank_functions.children_of(session.driver)[1]
        hand = threading.Thread(target=lambda: (worked.wait(), os.kill(victim, number)))
        hand.start()
        try:
            with pytest.raises(RingCompileError) as caught:
                _work(session, ids, decodes, worked)
        finally:
            worked.set()
            hand.join()
    waited = "( while others waited for it.*node: %.*layer: blocks)?"  # it may have been computing
    assert re.search("error: " + ENDS[number].format(waited), str(caught.value), re.DOTALL)
