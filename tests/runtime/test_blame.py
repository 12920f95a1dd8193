"""When a run ends badly, the rank to blame is named alone, and what others did last is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ringcompile.errors import RingCompileError
from ringcompile.runtime.launcher import launch
from ringcompile.runtime.processes import Processes
from ringcompile.runtime.recorder import KEPT, Recorder
from tests.runtime import rank_functions


def test_a_stopped_rank_is_named_alone(within) -> None:
    message = r"error: rank 2 did not answer within 2 s\n  hint: rank 2 got SIGSTOP, or a debugger"
    with within(30), pytest.raises(RingCompileError, match=message):
        launch(rank_functions.stop_in_the_ring, 4, timeout=2, threads=1)


def test_all_that_still_run_name_the_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that waited for one that waited for it; with the op and the user's line."""
    monkeypatch.setenv("RINGCOMPILE_RECORDS", str(tmp_path))
    with Processes(4, timeout=2, threads=1) as ranks:
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
