"""Ctrl-C, and what a job's launcher says of an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringcompile.compiler import transform
from ringcompile.held import remove_unfinished, scratch, whole_file
from tests.support import zoo_program

ROOT = Path(__file__).parents[1]
ABORTED = (1, "aborted\n", [])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupt") / "out"
    transform(zoo_program("llama-tiny"), "ring=2").save(folder)
    return folder


def processes(session: int) -> Iterator[int]:
    """What runs in a session, as far as the system tells."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, found = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(found) == session and state != "Z":
            yield int(entry.name)


def interrupted(
    words: list[str], cwd: Path, after: float, least: int = 1
) -> tuple[int, str, list[int]]:
    """A command's exit code, what it says and what is left, if it gets Ctrl-C.

    Args:
        words: the command.
        cwd: where it runs.
        after: seconds; it may take longer until there are as many processes.
        least: processes that it has to have by then.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "ringcompile", *words], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(cwd)},
    )
    try:
        time.sleep(after)
        while len(list(processes(process.pid))) < least:
            time.sleep(0.05)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
        deadline = time.monotonic() + 5
        while (left := list(processes(process.pid))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return process.returncode, said, left
    finally:
        process.kill()
        process.wait()


COMMANDS = {
    "while it imports": (["transform", "llama-tiny", "-o", "o", "--parallel", "ring=2"], 0.5, 1),
    "while it captures": (["transform", "dense-4l", "-o", "o", "--parallel", "ring=2"], 4.0, 1),
    "with ranks": (["bench", "{out}", "--seq", "512", "--steps", "100000"], 3.0, 4),
    "with processes that compile": (
        ["plan", "dense-4l", "--gpus", "16", "--cluster", "h100x16"], 3.0, 3),
    "in lock-step": (
        ["run", "{out}", "--backend", "lockstep", "--seq", "60000", "--outputs", "o.npy"], 6.0, 1),
}
SLOW = ("while it captures", "in lock-step", "with processes that compile")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "moment",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS],
)
def test_ctrl_c_is_one_line_and_leaves_nothing(out: Path, tmp_path: Path, moment: str) -> None:
    words, after, least = COMMANDS[moment]
    words = [word.format(out=out) for word in words]
    assert interrupted(words, tmp_path, after, least) == ABORTED
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith("ringcompile")] == []
    assert not any(path.name.startswith((".o", "o")) for path in tmp_path.iterdir())


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    code = (
        "import signal, os\n"
        "from ringcompile.interrupt import end_on_interrupt\n"
        "signal.signal(signal.SIGINT, {})\n"
        "end_on_interrupt()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('went on')"
    )
    for handler, expected in (("signal.SIG_IGN", (0, "went on\n", "")),
                              ("signal.default_int_handler", (1, "", "aborted\n"))):
        done = subprocess.run(
            [sys.executable, "-c", code.format(handler)], cwd=ROOT, capture_output=True, text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == expected


def test_of_a_job_the_first_rank_says_it() -> None:
    code = (
        "import signal, os\n"
        "from ringcompile.interrupt import end_on_interrupt\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "end_on_interrupt()\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, "RANK": rank}, check=False).stderr
        for rank in ("0", "1")
    ]
    assert said == ["aborted\n", ""]


def test_files_get_their_names_when_they_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    writing = whole_file(file)
    partial = writing.__enter__()
    partial.write_text("half")
    assert (partial.suffix, partial.parent) == (".txt", tmp_path)
    error = ValueError("on the way")
    assert not writing.__exit__(ValueError, error, None)
    assert (file.read_text(), list(tmp_path.iterdir())) == ("before", [file])
    with whole_file(file) as partial:
        partial.write_text("whole")
    assert (file.read_text(), list(tmp_path.iterdir())) == ("whole", [file])
    link = tmp_path / "link"
    link.symlink_to(file)
    with whole_file(link) as partial:
        partial.write_text("through")
    assert (link.is_symlink(), file.read_text()) == (True, "through")
    with whole_file(Path("/dev/null")) as partial:
        assert partial == Path("/dev/null")


def test_what_is_unfinished_is_removed_at_once(tmp_path: Path) -> None:
    with scratch() as folder, whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        (folder / "file").touch()
        remove_unfinished()
        assert not folder.exists()
        assert not partial.exists()
        partial.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow  # test_parallelize.py has errors under torchrun among the fast ones
def test_torchruns_report_ends_with_our_error(out: Path) -> None:
    """Of its thirty lines the last ones are about the first rank that failed."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
         "-m", "ringcompile", "run", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )
    assert done.returncode == 1
    report = done.stderr.partition("Root Cause (first observed failure)")[2]
    assert "error: the program is for 2 ranks (ring=2), but the job has 1" in report
    assert "hint: start 2 ranks, or transform the model for 1" in report
    assert "To enable traceback" not in report
