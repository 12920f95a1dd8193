"""What becomes of a job in which something happens to one rank: a table of starts, faults, moments.

All others are out in time, name the rank and what they waited for, and nothing stays.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringcompile import compiler
from tests.runtime.hosts import PORT, Host, two_hosts, why_not
from tests.runtime.struck import FAULTS, MOMENTS, STARTS, Plan
from tests.support import zoo_program

ROOT = Path(__file__).parents[2]
VICTIM = 1
TIMEOUT = 6.0  # seconds of an exchange and of joining, where nobody but the time tells
SOON, LATE = 5.0, 2.0  # seconds: after a death; after the timeout, where a rank is stopped
LOADED = 2.5  # seconds more that a busy machine with two cores may take
ENDING = 40.0  # seconds for interpreters to end; torchrun gives ranks 30 to do so
# What is said of the rank; nobody but its parent knows how a rank has ended.
KILLED = {
    "SIGKILL": "rank 1 was killed by SIGKILL", "SIGTERM": "rank 1 was killed by SIGTERM",
    "SIGSTOP": "rank 1 did not (answer|join) within 6 s",
    "socket": r"lost ranks? [\d, ]+ in %|rank 1 lost",
}
LOST = r"rank \d lost ranks? (1|0, 1|1, 2|0, 2|0) in %"
UNJOINED = r"rank 1 did not join within 6 s|cannot connect to rank 1|torch.*error|lost ranks? 1"


@dataclass
class Job:
    """Processes that were started, and where they write down what happens."""

    plan: Plan
    processes: list[subprocess.Popen[str]]
    said: list[str] = field(default_factory=list)

    @property
    def notes(self) -> Path:
        """Where ranks write."""
        return Path(self.plan.notes)

    def pids(self) -> dict[int, int]:
        """The process of each rank, as far as it has begun."""
        return {int(path.name[4:]): int(path.read_text() or 0)
                for path in self.notes.glob("rank?")}

    def alive(self) -> list[int]:
        """The ranks that have not ended."""
        for process in self.processes:
            process.poll()  # one that has ended stays until somebody has asked
        return [rank for rank, pid in self.pids().items() if _runs(pid)]

    def wait(self) -> None:
        """Until all have ended, but for a stopped rank that nobody watches; then end that, too."""
        deadline = time.monotonic() + 90 + ENDING
        nobodys = self.plan.fault == "SIGSTOP" and len(self.processes) > 1
        watched = [p for i, p in enumerate(self.processes) if not nobodys or i != self.plan.victim]
        while any(p.poll() is None for p in watched) and time.monotonic() < deadline:
            time.sleep(0.05)
        late = [p.pid for p in watched if p.poll() is None]
        for pid in self.pids().values():
            if late or pid == self.pids().get(self.plan.victim):
                _kill(pid)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        self.said = ["\n".join(filter(None, p.communicate(timeout=60))) for p in self.processes]
        assert late == [], self.said

    def seconds(self) -> list[float]:
        """From what happened to what each process said of it."""
        struck = float((self.notes / "struck").read_text())
        return [float(path.read_text()) - struck for path in self.notes.glob("said*")]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a small decoder on a ring of three, with a cache."""
    folder = tmp_path_factory.mktemp("kills") / "out"
    compiler.transform(zoo_program("llama-tiny"), "ring=3", cache=4096).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of one on two axes, for two ranks on each of two hosts."""
    folder = tmp_path_factory.mktemp("kills") / "out"
    compiler.transform(zoo_program("llama-tiny"), "ring=2,tp=2", cache=4096).save(folder)
    return str(folder)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
            "RINGCOMPILE_RECORDS": str(folder / "records"), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def place(rank: int, size: int, address: str, port: str, each: int) -> dict[str, str]:
    """The variables of one rank."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % each),
            "LOCAL_WORLD_SIZE": str(each), "MASTER_ADDR": address, "MASTER_PORT": port}


def begin(plan: Plan, folder: Path, size: int = 3) -> Job:
    """Start the ranks as planned."""
    command, module = [sys.executable], ["-m", "tests.runtime.struck", plan.to_json()]
    port, environment = _free_port(), _environment(folder)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", port]
    variables = [place(rank, size, "127.0.0.1", port, size) for rank in range(size)]
    rows = {
        "local": [(module, {})], "torchrun": [([*torchrun, *module], {})],
        "plain": [(module, row) for row in variables],
    }[plan.start]
    return Job(plan, [
        subprocess.Popen(
            command + arguments, env={**environment, **more}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) for arguments, more in rows
    ])


def rows() -> Iterator[object]:
    """All of the table; a broken connection needs one that is there."""
    for start in STARTS:
        for fault in FAULTS:
            for moment in MOMENTS:
                if fault == "packets" or (fault == "socket" and moment in ("start", "join")):
                    continue
                row = (start, fault, moment)
                yield pytest.param(*row, id="-".join(row))


@pytest.mark.slow  # test_blame.py has a rank that is killed while it decodes among the fast ones
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("start", "fault", "moment"), list(rows()))
def test_the_others_end_and_say_who_was_lost(
    start: str, fault: str, moment: str, artifact: str, tmp_path: Path, folder: Path
) -> None:
    plan = Plan(artifact, start, fault, moment, VICTIM, str(tmp_path),
                *((TIMEOUT, TIMEOUT) if _timed(start, fault, moment) else (300.0, 300.0)))
    job = begin(plan, folder)
    job.wait()
    text = "\n".join(job.said)
    assert re.search(_expected(start, fault, moment), text, re.DOTALL), text[-3000:]
    if moment in ("run", "decode"):
        assert re.search(r"transformer\.py:\d+: error: .*\n.*\n  node: %\w+\n  layer: blocks", text)
    limit = (TIMEOUT + LATE if _timed(start, fault, moment) else SOON) + LOADED
    assert all(seconds < limit for seconds in job.seconds()), job.seconds()
    assert job.alive() == []
    assert "Traceback" not in text.partition("torch/distributed/elastic")[0]
    assert [path.name for path in folder.glob("ringcompile*")] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["SIGSTOP", "SIGKILL"])
def test_the_rank_that_holds_the_store(
    fault: str, wide: str, tmp_path: Path, folder: Path
) -> None:
    """It takes the store with it, or leaves the others without an answer; along two axes."""
    plan = Plan(wide, "plain", fault, "decode", 0, str(tmp_path), TIMEOUT, 60.0)
    job = begin(plan, folder, 4)
    job.wait()
    text = "\n".join(job.said)
    limit = (TIMEOUT + LATE if fault == "SIGSTOP" else SOON) + LOADED
    assert all(seconds < limit for seconds in job.seconds()), job.seconds()
    assert len(job.seconds()) == 3
    assert re.search(r"rank \d lost rank 0 in %", text), text[-3000:]
    assert job.alive() == []


_REASON = why_not()


def cut(hosts: tuple[Host, Host]) -> tuple[str, ...]:
    """A command that drops every packet between two hosts, in both directions."""
    each = " && ".join(
        f"ip netns exec {host.name} tc qdisc add dev {host.interface} root pfifo limit 0"
        for host in hosts
    )
    return ("sh", "-c", each)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
@pytest.mark.parametrize("start", ["plain", "torchrun"])
@pytest.mark.parametrize("moment", MOMENTS[2:])
def test_hosts_between_which_packets_are_dropped(
    start: str, moment: str, wide: str, tmp_path: Path, folder: Path
) -> None:
    """Two ranks on each; both sides end, and the first names the ranks of the other."""
    with two_hosts() as hosts:
        plan = Plan(wide, start, "packets", moment, VICTIM, str(tmp_path), TIMEOUT, 60.0,
                    cut(hosts))
        module, environment = ["-m", "tests.runtime.struck", plan.to_json()], _environment(folder)
        address = hosts[0].address
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
                    "--master-addr", address, "--master-port", PORT, "--node-rank"]
        job = Job(plan, [
            hosts[rank // 2].start(module, {**environment, **place(rank, 4, address, PORT, 2)})
            for rank in range(4)
        ] if start == "plain" else [
            host.start([*torchrun, str(i), *module], environment) for i, host in enumerate(hosts)
        ])
        job.wait()
        assert [host.processes() for host in hosts] == [[], []]
    text = "\n".join(job.said)
    assert re.search(r"rank [01] lost ranks? (2|3|2, 3) in %\w+: ", text), text[-3000:]
    if start == "plain":
        assert re.search(r"rank [23] lost ranks? (0|1|0, 1) in %\w+: ", text), text[-3000:]
        assert len(job.seconds()) == 4
    assert all(seconds < TIMEOUT + LATE + LOADED for seconds in job.seconds()), job.seconds()
    assert "Traceback" not in text.partition("torch/distributed/elastic")[0]


def _timed(start: str, fault: str, moment: str) -> bool:
    """Whether nobody sees what happens, so that a timeout ends it."""
    return fault == "SIGSTOP" or (start == "plain" and moment in ("start", "join"))


def _expected(start: str, fault: str, moment: str) -> str:
    if start == "local":
        return KILLED[fault]
    if start == "torchrun" and fault in ("SIGKILL", "SIGTERM"):
        lost = LOST + r".*" if moment in ("run", "decode") else ""
        return lost + rf"Root Cause.*rank      : {VICTIM} .*\({fault}\)"
    return LOST if moment in ("run", "decode") else UNJOINED
