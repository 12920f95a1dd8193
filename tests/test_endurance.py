"""What must not add up over many runs, and must not differ between them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ringcompile import compiler, execution
from ringcompile.runtime.inprocess import run_lockstep
from tests.fuzz.pristine import pristine

ROOT = Path(__file__).parents[1]
SAVE = """
    from ringcompile import compiler
    from ringcompile.capture.export import capture
    from ringcompile.models import zoo
    import sys

    module, args = zoo.build("mixtral-tiny")
    made = compiler.transform(capture(module.eval(), args), "ring=2,tp=2")
    made.save(sys.argv[1])
"""


def used() -> tuple[int, int]:
    """Resident bytes, and open descriptors, of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("loads", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_artifacts_that_are_loaded_and_dropped_leave_nothing_open(loads: int) -> None:
    clean = pristine("small")
    execution.run(compiler.load(clean.folder), clean.inputs)
    before = used()[1]
    for _ in range(loads):
        execution.run(compiler.load(clean.folder), clean.inputs)
    assert used()[1] == before


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_runs_take_no_more_memory() -> None:
    clean = pristine("small")
    made = compiler.load(clean.folder)

    def run(times: int) -> None:
        for i in range(times):
            inputs = (torch.randn(1, 4 + i % 9, 8),)
            run_lockstep(made.ranks(), made.mesh, made.source, inputs)

    run(1000)
    memory, descriptors = used()
    run(10_000)
    assert used()[0] - memory < 20 << 20
    assert used()[1] == descriptors


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_artifacts_are_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    contents = []
    for seed in range(20):
        folder = tmp_path / str(seed)
        script = "\n".join(line[4:] for line in SAVE.splitlines())
        subprocess.run(
            [sys.executable, "-c", script, str(folder)], check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)},
        )
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    for other in contents[1:]:
        assert {name for name in other if other[name] != contents[0][name]} == set()
