"""A rank's process and a parent that is gone before it has answered."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from multiprocessing import Pipe, Process
from pathlib import Path
from ringcompile.runtime.worker import RankPlace, serve

def rank(folder):
    parent, own = Pipe()
    alive, lifeline = Pipe()
    parent.close()
    serve(own, lifeline, RankPlace(0, 1, Path(folder), "gloo", 1, 5.0, 5.0, {}))

process = Process(target=rank, args=(sys.argv[1],), name="ringcompile-rank0")
process.start()
process.join(60)
print(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="starts the rank by a fork")
def test_a_rank_whose_parent_has_ended_says_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


BLOCKED = """
import os
from pathlib import Path
from ringcompile.runtime.processes import Processes

with Processes(1):
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"forkserver import" in Path(f"/proc/{pid}/cmdline").read_bytes():
            status = Path(f"/proc/{pid}/status").read_text()
            mask = next(line for line in status.splitlines() if line.startswith("SigBlk"))
            print(bool(int(mask.split()[1], 16) & 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_is_forked_with_ctrl_c_blocked() -> None:
    """Between its fork and its first line a rank would print a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
