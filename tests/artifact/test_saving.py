"""Saves and runs that are killed leave nothing torn, and nothing for long."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringcompile import held
from ringcompile.artifact import files, load
from ringcompile.errors import RingCompileError
from tests.artifact import killed_saves
from tests.artifact.support import compile_model, save_model

ROOT = Path(__file__).parents[2]
MODEL = "gpt-tiny"
# Saves again and again, and says which one it begins; with HALT it stops between the two renames.
SAVER = """
    import os, signal, sys
    from pathlib import Path
    from tests.artifact.support import compile_model, save_model

    parallel = compile_model("gpt-tiny")
    rename = Path.rename

    def halting(self, target):
        if ".tmp-" in self.name and Path(target).name == "out":
            print("between", flush=True)
            signal.pause()
        return rename(self, target)

    if sys.argv[2] == "halt":
        Path.rename = halting
    print("ready", flush=True)
    for count in range(10**6):
        save_model(parallel, Path(sys.argv[1]), overwrite=True, options={"count": count})
"""


def saver(folder: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(folder), how],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True,
    )


def said(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(compile_model(MODEL), tmp_path / "out", options={"count": -1})


@pytest.fixture
def between(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A save that stands between moving the old version aside and the new one to its place."""
    process = saver(folder, "halt")
    said(process, "ready")
    said(process, "between")
    yield process
    end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def test_a_save_killed_between_its_renames(
    folder: Path,
    between: subprocess.Popen[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it runs it is left alone; then the old version is put back."""
    monkeypatch.setattr(files, "_SWAP_SECONDS", 0.1)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(RingCompileError, match="there is no folder"):
        load(folder)
    assert sorted(folder.parent.iterdir()) == before
    assert between.poll() is None
    end(between)
    assert sorted(path.name.split("-")[0] for path in folder.parent.iterdir()) == [
        ".out.old", ".out.tmp"
    ]
    found = load(folder)
    assert found.manifest["options"] == {"count": -1}
    found.check()
    assert caplog.messages == [
        f"a save of '{folder}' was interrupted; the previous version has been restored"
    ]
    assert list(folder.parent.iterdir()) == [folder]


def test_the_next_save_puts_it_back_too(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.rename(folder.parent / ".out.old-1")
    (folder.parent / ".out.tmp-2").mkdir()
    with pytest.raises(RingCompileError, match="is not empty"):
        save_model(compile_model(MODEL), folder)
    assert "has been restored" in caplog.text
    save_model(compile_model(MODEL), folder, overwrite=True, options={"count": 7})
    assert load(folder).manifest["options"] == {"count": 7}
    assert list(folder.parent.iterdir()) == [folder]


EVERY_NTH = [pytest.param(12, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
PATIENT = pytest.mark.timeout(3600)  # what counts is how often, and machines may be busy


@pytest.mark.parametrize("nth", EVERY_NTH)
def test_a_save_killed_at_any_step(folder: Path, nth: int) -> None:
    """There is one whole version, the old or the new one; the next save clears up."""
    parallel = compile_model(MODEL)
    names = killed_saves.steps_of_a_save(parallel, folder)
    aside, into_place = [at for at, name in enumerate(names) if name.startswith("os.rename")][-2:]
    assert into_place == aside + 1, "a kill at the second is one between the two"
    before = 0
    for at in sorted({*range(0, len(names), nth), aside, into_place, into_place + 1}):
        assert killed_saves.killed_save(parallel, folder, at, at), names[at]
        assert folder.exists() == (at != into_place)
        found = load(folder)
        found.check()
        assert found.manifest["options"]["count"] == (before if at <= into_place else at)
        killed_saves.save(parallel, folder, at)
        before = at
        assert list(folder.parent.iterdir()) == [folder]
    assert not killed_saves.killed_save(parallel, folder, 0, 10**6)


@pytest.mark.parametrize("nth", EVERY_NTH)
def test_a_first_save_killed_at_any_step(tmp_path: Path, nth: int) -> None:
    parallel, folder = compile_model(MODEL), tmp_path / "out"
    names = killed_saves.steps_of_a_save(parallel, folder)
    for at in range(0, len(names), nth):
        shutil.rmtree(folder)
        if not killed_saves.killed_save(parallel, folder, at, at):
            continue  # nothing was there to be moved aside: fewer steps
        if folder.exists():
            load(folder).check()
        killed_saves.save(parallel, folder, at)
        assert list(tmp_path.iterdir()) == [folder]


@PATIENT
@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_any_time_during_saves(folder: Path, kills: int) -> None:
    """None is torn or missing; leftovers of one are cleared up by the next."""
    parallel = compile_model(MODEL)
    for i in range(kills):
        killed_saves.saves_killed_after(parallel, folder, 0.001 + i % 50 * 0.004)
        load(folder).check()
    killed_saves.save(parallel, folder, -1)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("nth", EVERY_NTH)
def test_a_disk_that_is_full_at_any_step(folder: Path, nth: int) -> None:
    """One error, and the old version stays."""
    parallel = compile_model(MODEL)
    names = killed_saves.steps_of_a_save(parallel, folder)
    steps = [at for at, name in enumerate(names) if name.endswith("makes") and at][::-nth]
    assert "rename" in names[steps[0]]
    for at in steps:
        said = killed_saves.refused_save(parallel, folder, 1, at)
        assert said == f"cannot write '{folder}': No space left on device", names[at]
        found = load(folder)
        found.check()
        assert found.manifest["options"]["count"] == 0
        assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("limit", [0, 100, 5_000, 20_000])
def test_a_disk_that_takes_no_more(folder: Path, limit: int) -> None:
    """Writes fail at some size of a file; Python turns the signal off and gets an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RingCompileError, match=r"cannot write"):
            save_model(compile_model(MODEL), folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load(folder).manifest["options"] == {"count": -1}
    assert list(folder.parent.iterdir()) == [folder]


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, rename = [], Path.rename
    monkeypatch.setattr(files, "sync", lambda path: written.append(path.name))

    def renamed(self: Path, target: Path) -> Path:
        if target.name == "out":
            names = {path.name for path in self.iterdir()}
            assert names | {self.name} == set(written)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    save_model(compile_model(MODEL), tmp_path / "out")
    assert written[-1] == tmp_path.name


def test_a_system_that_cannot_sync_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(RingCompileError, match="Input/output error"):
        save_model(compile_model(MODEL), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = (
        "import time; from ringcompile.held import scratch\n"
        "with scratch() as f: (f / 'x').write_text(''); print(f, flush=True); time.sleep(60)"
    )
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    folders = [Path(job.stdout.readline().strip()) for job in jobs if job.stdout]
    end(jobs[0])
    (tmp_path / "ringcompile-run-mine").write_text("a file of that name")
    with held.scratch() as folder:
        assert not folders[0].exists(), "its process is gone"
        assert folders[1].exists(), "its process still runs"
        assert folder.is_dir()
        assert oct(folder.stat().st_mode)[-3:] == "700"
    end(jobs[1])
    held.remove_left_over(tmp_path, "ringcompile-run-")
    assert [path.name for path in tmp_path.iterdir()] == ["ringcompile-run-mine"]


def test_where_nothing_can_be_locked_nothing_is_taken_for_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuses)
    (tmp_path / ".out.tmp-1").mkdir()
    folder = save_model(compile_model(MODEL), tmp_path / "out")
    save_model(compile_model(MODEL), folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp-1", "out"]
    shutil.rmtree(folder)
    (tmp_path / ".out.tmp-1").rename(folder)
