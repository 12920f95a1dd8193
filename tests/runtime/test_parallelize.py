"""`rc.parallelize`: two ranks under torchrun, and a process group that is there already."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ringcompile as rc
from tests.runtime.parallelize_job import tiny

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every case gave, by rank."""
    folder = tmp_path_factory.mktemp("job")
    done = subprocess.run(
        [*TORCHRUN, "-m", "tests.runtime.parallelize_job", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


SHOWN = "Parallelized(ring=2, rank {rank}, outputs='whole')"
RIGHT: dict[str, list[Any]] = {  # of each rank
    "whole": [["Output", "Output", SHOWN.format(rank=rank)] for rank in range(2)],
    "with_a_mask": [["Output", True]] * 2  , # and the whole weights are freed
    "local": [[0, "Tensor", 8], [1, "Tensor", 8]],
    "devices": [["Output", True]] * 2,
    "by_run": [["dict", 0], [None, 1]],
    "by_session": ["dict", False],
}


@pytest.mark.parametrize("case", RIGHT)
def test_ranks_compute_what_the_module_computes(
    results: list[dict[str, Any]], case: str
) -> None:
    assert [found[case] for found in results] == RIGHT[case]


ERRORS = {
    "other_weights": "error: rank 1 runs another weights than rank 0",
    "other_inputs": "error: rank 1 got other inputs than rank 0\n"
    "  hint: start all ranks with the same inputs",
    "other_flag": "error: the argument 'scale' is 2.0 in this call, and 1.0 in the example that "
    "the model was captured with\n  hint: only tensors may change from call to call; parallelize "
    "the model again for other flags and numbers",
    "a_tensor_for_none": "error: the argument 'mask' is a tensor, or missing in this call, and "
    "None in the example that the model was captured with\n  hint: only",
    "unknown_argument": "error: the arguments do not fit Tiny.forward: got an unexpected keyword "
    "argument 'padding'\n  hint: pass the arguments that the model is called with",
    "no_names": "error: the dims of the device mesh have no names\n  hint: name them by axes: "
    "init_device_mesh(..., mesh_dim_names=('ring', 'tp'))",
    "no_axes": "error: unknown mesh axis 'seq'\n  hint: axes are: ",
    "part_of_a_mesh": "error: the device mesh holds the ranks [{rank}], but the job has the ranks "
    "0 to 1\n  hint: pass the mesh of all ranks, in order: a part of a mesh cannot run by itself",
    "too_many_ranks": "error: the program is for 4 ranks (ring=4), but the job has 2\n  hint: "
    "start 4 ranks, or transform the model for 2",
    "a_cache": "error: a module that is parallelized has no cache\n  hint: use rc.transform with "
    "cache=, and rc.Session or rc.generate",
    "no_example": "error: the example is a int\n  hint: pass one tensor, a tuple of positional "
    "arguments, or a dict of keyword arguments",
    "no_such_form": "error: unknown form of outputs 'first'\n  hint: one of: whole, local",
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_is_one_error_on_every_rank(
    results: list[dict[str, Any]], case: str
) -> None:
    for rank, found in enumerate(results):
        assert str(found[case]).startswith(ERRORS[case].format(rank=rank))


def test_without_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = "no job to join.*\n  hint: start the ranks with: torchrun --nproc-per-node 2"
    with pytest.raises(rc.RingCompileError, match=message):
        rc.parallelize(tiny(), torch.zeros(1, 8, dtype=torch.int64), "ring=2")
