"""Local processes: what reaches them, what comes back, and what becomes of ranks that fail."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from ringcompile.errors import RingCompileError
from ringcompile.runtime.join import pick_backend
from ringcompile.runtime.launcher import launch
from ringcompile.runtime.processes import Processes
from ringcompile.runtime.transport import pack
from tests.runtime import rank_functions

ROOT = Path(__file__).parents[2]


def test_tensors_go_there_and_back() -> None:
    x = torch.arange(6.0).reshape(2, 3).T
    results = launch(rank_functions.scaled, 3, ({"x": x, "none": torch.empty(0, 2)},))
    for index, result in enumerate(results):
        assert result["index"] == index
        assert torch.equal(result["by"][0], x * index)
        assert result["by"][1].shape == (0, 2)
        result["by"][0] += 1  # its memory is the caller's own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int8, torch.complex64])
def test_any_dtype_goes_there_and_back(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 1]]).to(dtype)
    results = launch(rank_functions.scaled, 2, ({"x": x, "none": torch.tensor(True)},))
    assert torch.equal(results[1]["by"][0], x * 1)
    assert results[1]["by"][1].shape == ()


def test_ranks_stay_from_call_to_call(within) -> None:
    with Processes(2) as ranks:
        first = ranks.call(rank_functions.remember, 5)
        second = ranks.call(rank_functions.remember, 6)
    assert [before for before, _ in first] == [None, None]
    assert [before for before, _ in second] == [5, 5]
    assert [pid for _, pid in first] == [pid for _, pid in second]
    with pytest.raises(RingCompileError, match="the ranks have ended"):
        ranks.call(rank_functions.remember, 7)


def test_ranks_see_this_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGCOMPILE_TEST", "now")
    assert (
        launch(rank_functions.surroundings, 2, ("RINGCOMPILE_TEST",), threads=2)
        == [("now", 2, True)] * 2
    )


def test_ranks_share_what_takes_long_to_import() -> None:
    """Else every rank imports it by itself at its first op."""
    assert launch(rank_functions.imported, 2, ("torch._dynamo",)) == [True] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_listen_on_the_loopback_interface_only() -> None:
    assert launch(rank_functions.listening, 2) == [{"0100007F"}] * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            rank_functions.raise_error,
            r"rank_functions\.py:\d+: error: rank 1 failed: ValueError: boom",
        ),
        (rank_functions.refuse, r"^model\.py:7: error: no such thing\n  hint: take another"),
        (rank_functions.be_killed, "rank 1 was killed by SIGKILL\n  hint: .*memory"),
        (rank_functions.leave, "rank 1 ended with exit code 3"),
        (rank_functions.call_exit, "rank 1 failed: SystemExit: enough"),
        (rank_functions.unpicklable, "rank 1 failed: .*pickle"),
        (rank_functions.sleep, "rank 1 did not answer within 1 s"),
        (rank_functions.lose_a_peer, "rank 1 lost rank 0 in %arrived: .*1000ms"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_fails_ends_all(function, message: str, within) -> None:
    nproc = 2 if function is rank_functions.lose_a_peer else 3
    with within(6), pytest.raises(RingCompileError, match=message):
        launch(function, nproc, timeout=1 if "1 s" in message or "1000ms" in message else 60)


def test_an_error_keeps_its_traceback() -> None:
    with pytest.raises(RingCompileError) as caught:
        launch(rank_functions.raise_error, 2)
    assert "in raise_error" in "".join(caught.value.__notes__)


def test_a_rank_that_dies_between_calls_is_named(within) -> None:
    with within(5), Processes(3) as ranks:
        pids = [pid for _, pid in ranks.call(rank_functions.remember, 0)]
        os.kill(pids[1], signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(RingCompileError, match="rank 1 was killed by SIGTERM"):
            ranks.call(rank_functions.remember, 1)


def test_a_rank_that_never_joins_is_named(monkeypatch: pytest.MonkeyPatch, within) -> None:
    start = ForkServerProcess.start

    def start_and_stop(process: ForkServerProcess) -> None:
        start(process)
        if process.name.endswith("1"):
            os.kill(process.pid or 0, signal.SIGSTOP)

    monkeypatch.setattr(ForkServerProcess, "start", start_and_stop)
    message = "error: rank 1 did not join within 3 s\n  hint: "
    with within(10), pytest.raises(RingCompileError, match=message):
        Processes(3, join_timeout=3)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("mpi", "unknown backend 'mpi'\n  hint: backends are: auto, gloo, nccl"),
        ("nccl", "NCCL needs a GPU for each of the 1000 ranks on this machine, there are"),
    ],
)
def test_a_backend_that_cannot_be(backend: str, message: str) -> None:
    with pytest.raises(RingCompileError, match=message):
        Processes(1000, backend=backend)
    assert pick_backend("auto", 1000) == "gloo"


def test_a_tensor_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    message = r"cannot write 24 bytes to .*/missing/x-0 .*\n  hint: free space there"
    with pytest.raises(RingCompileError, match=message):
        pack({"deep": [torch.zeros(6)]}, tmp_path / "missing", "x")


SCRIPT = """
    # No `if __name__ == "__main__"`: the ranks do not run this file.
    import signal

    from ringcompile.runtime.launcher import launch
    from ringcompile.runtime.processes import Processes
    from tests.runtime import rank_functions

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored behind a shell's `&`
    launch(rank_functions.scaled, 2, ({"x": 1, "none": None},))
    with Processes(2) as ranks:
        print([pid for _, pid in ranks.call(rank_functions.remember, 0)], flush=True)
        ranks.call(rank_functions.sleep)
"""


# test_interrupt.py has Ctrl-C for a command with ranks among the fast ones.
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_no_rank_outlives_the_script_that_started_it(
    tmp_path: Path, folder: Path, number: signal.Signals, within
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().strip("[]\n").split(",")]
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        with within(10):
            stdout, stderr = process.communicate(timeout=30)
            while any(Path(f"/proc/{pid}").exists() for pid in pids):
                time.sleep(0.01)
    assert stdout == ""  # what ranks print goes to standard error
    assert stderr.count("noise of a rank") == 2
    assert ("KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
