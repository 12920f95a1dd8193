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
