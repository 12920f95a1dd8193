"""Real processes over gloo: the numbers of the model, the bytes of the lock-step run."""

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch

from ringcompile import artifact
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime import join
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.join import join_torchrun, under_torchrun
from ringcompile.runtime.launcher import LocalRanks, launch
from ringcompile.runtime.runner import Settings
from tests.runtime import rank_functions
from tests.support import TOLERANCE, difference, some_fast, zoo_program

ROOT = Path(__file__).parents[2]
Saved = Callable[..., tuple[ParallelProgram, str]]


@cache
def captured(name: str) -> Program:
    return zoo_program(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Returns `saved(name, spec, order)`: the compiled zoo model, and a folder that holds it."""

    @cache
    def save(name: str, spec: str, order: str = "auto") -> tuple[ParallelProgram, str]:
        folder = tmp_path_factory.mktemp(name) / "program"
        parallel = transform(captured(name), spec, order=order)
        parallel.save(folder)
        return parallel, str(folder)

    return save


@torch.no_grad()
def hold(ranks: LocalRanks, parallel: ParallelProgram, name: str, length: int) -> None:
    """One run against the model and against lock-step."""
    module, inputs = zoo.build(name, sequence=length)
    run = ranks.run(inputs)
    alone = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs)
    assert difference(run.outputs, module(*inputs)) <= TOLERANCE
    assert torch.equal(run.outputs, alone.outputs)
    assert [stats.bytes_sent for stats in run.stats] == alone.bytes_sent
    assert [stats.rank for stats in run.stats] == list(range(parallel.world_size))
    assert all(0 <= stats.wait_seconds <= stats.seconds for stats in run.stats)
    assert all(2**20 < stats.peak_bytes < 2**32 for stats in run.stats)


@pytest.mark.parametrize(
    ("name", "spec", "order"),
    some_fast(
        ["llama-tiny", "bert-tiny"], ["ring=2", "ring=4"], ["contiguous", "zigzag"],
        fast=lambda *case: case in (
            ("llama-tiny", "ring=4", "zigzag"), ("bert-tiny", "ring=2", "contiguous")
        ),
    ),
)
def test_one_pool_serves_all_lengths(saved: Saved, name: str, spec: str, order: str) -> None:
    parallel, folder = saved(name, spec, order)
    with LocalRanks(artifact.load, (folder,), backend="gloo") as ranks:
        for length in (48, 45, 9, 48):
            hold(ranks, parallel, name, length)


@pytest.mark.slow  # test_joined_axes has six, and lock-step has sixteen among the fast ones
def test_sixteen_ranks(saved: Saved) -> None:
    parallel, folder = saved("dense-4l-tiny", "ring=16")
    with LocalRanks(artifact.load, (folder,), backend="gloo") as ranks:
        hold(ranks, parallel, "dense-4l-tiny", 45)


def test_compiled_groups(saved: Saved) -> None:
    """With torch's tracing backend, which generates no code: the ranks' own numbers stay."""
    parallel, folder = saved("llama-tiny", "ring=2", "zigzag")
    settings = Settings(compiler="eager")
    with LocalRanks(artifact.load, (folder,), backend="gloo", settings=settings) as ranks:
        for length in (48, 9):
            hold(ranks, parallel, "llama-tiny", length)


def test_inputs_that_do_not_fit_leave_the_ranks_alive(saved: Saved) -> None:
    parallel, folder = saved("llama-tiny", "ring=2", "zigzag")
    with LocalRanks(artifact.load, (folder,)) as ranks:
        with pytest.raises(RingCompileError, match="the program takes"):
            ranks.run((torch.zeros(1, 8),))
        with pytest.raises(RingCompileError, match="takes the inputs"):
            ranks.run(())
        hold(ranks, parallel, "llama-tiny", 8)


def test_another_number_of_ranks_is_refused(saved: Saved) -> None:
    _, folder = saved("llama-tiny", "ring=2", "zigzag")
    with pytest.raises(RingCompileError, match=r"is for 2 ranks \(ring=2\), but the job has 3"):
        LocalRanks(artifact.load, (folder,), nproc=3)


def test_a_damaged_program_is_the_ranks_error(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(RingCompileError, match="manifest"):
        LocalRanks(artifact.load, (str(tmp_path),))


def test_ranks_with_different_programs_are_refused(saved: Saved) -> None:
    folders = [saved("llama-tiny", "ring=2", order)[1] for order in ("contiguous", "zigzag")]
    with pytest.raises(RingCompileError, match="rank 1 runs another artifact than rank 0: "):
        launch(rank_functions.open_each, 2, (folders,))


def test_ranks_with_their_own_inputs(saved: Saved) -> None:
    parallel, folder = saved("llama-tiny", "ring=2", "zigzag")
    _, (tokens,) = zoo.build("llama-tiny", sequence=13)
    (outputs, stats), (nothing, same) = launch(
        rank_functions.run_checked, 2, (folder, [tokens, tokens])
    )
    alone = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, tokens)
    assert torch.equal(outputs, alone.outputs)
    assert nothing is None
    assert stats == same
    assert [row.bytes_sent for row in stats] == alone.bytes_sent
    for other in (tokens[:, :12], tokens + 1):
        with pytest.raises(RingCompileError, match="rank 1 got other inputs than rank 0"):
            launch(rank_functions.run_checked, 2, (folder, [tokens, other]))


def test_each_axis_has_its_own_group() -> None:
    found = launch(rank_functions.two_axes, 4)
    assert found == [
        (2.0, [0.0, 1.0], 24, True),
        (3.0, [0.0, 1.0], 24, True),
        (0.0, [2.0, 3.0], 24, True),
        (1.0, [2.0, 3.0], 24, True),
    ]


@pytest.mark.parametrize(
    "axis", ["ulysses,ring", pytest.param("ring,ulysses", marks=pytest.mark.slow)]
)
def test_ranks_of_joined_axes_are_in_the_order_of_the_axes(axis: str) -> None:
    """Whatever the order of the mesh, in which torch has them."""
    ranks = Mesh.parse("ulysses=2,ring=3").group_of(0, axis)
    for rank, found in enumerate(launch(rank_functions.joined_axes, 6, (axis,), threads=1)):
        place = ranks.index(rank)
        assert found == {
            "gather": ranks, "all_to_all": ranks, "meant": [10 * place] * 6,
            "reduce_scatter": [60 * place],
        }


def test_every_dtype_can_be_gathered() -> None:
    for found in launch(rank_functions.gathered_dtypes, 2):
        assert all(found.values()), found


JOB = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables of a job of 3 ranks that nobody else joins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_job_of_another_size_is_refused(job: pytest.MonkeyPatch, within) -> None:
    assert under_torchrun()
    message = r"is for 2 ranks \(ring=2\), but the job has 3\n  hint: start 2 ranks, or transform"
    with within(1), pytest.raises(RingCompileError, match=message):
        join_torchrun(Mesh.parse("ring=2"))


@pytest.mark.parametrize(
    ("rank", "message"),
    [("0", "ranks 1, 2 did not join within 1 s\n  hint: see whether"),
     ("1", r"rank 1 cannot reach the job at 127.0.0.1:\d+ within 1 s: ")],
)
def test_a_job_that_others_do_not_join(
    job: pytest.MonkeyPatch, rank: str, message: str, within
) -> None:
    job.setenv("RANK", rank)
    with within(8), pytest.raises(RingCompileError, match=message):
        join_torchrun(Mesh.parse("ring=3"), join_timeout=1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_the_store_of_rank_0_listens_where_master_addr_says(
    job: pytest.MonkeyPatch, address: str
) -> None:
    job.setenv("MASTER_ADDR", address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        job.delenv(name, raising=False)
    before = rank_functions.listening(None)
    store = join._job_store(0, 3, timedelta(seconds=5))
    other = join._job_store(1, 3, timedelta(seconds=5))
    store.set("key", "value")
    assert other.get("key") == b"value"
    new = rank_functions.listening(None) - before
    assert new <= {"0100007F", "00000000000000000000000001000000"}
    assert os.environ["GLOO_SOCKET_IFNAME"] == join.LOOPBACK
    job.delenv("GLOO_SOCKET_IFNAME")
    job.delenv("NCCL_SOCKET_IFNAME")


def test_a_port_that_is_taken_is_said(job: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(RingCompileError, match=r"rank 0 cannot listen at 127\.0\.0\.1:"):
            join_torchrun(Mesh.parse("ring=3"), join_timeout=1)


def test_no_job_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RingCompileError, match=r"no job to join.*RANK.*\n  hint: .*torchrun"):
        join_torchrun(Mesh.parse("ring=2"))


SCRIPT = """
    import sys, torch
    from ringcompile import artifact
    from ringcompile.runtime.distributed import Peer
    from ringcompile.runtime.join import join_torchrun

    parallel = artifact.load(sys.argv[1])
    rank = join_torchrun(parallel.mesh, backend="gloo")
    peer = Peer(parallel, rank, check_inputs=True)
    outputs = peer.assemble(peer.run((torch.arange(13)[None],)))
    if rank.index == 0:
        torch.save(outputs, sys.argv[2])
"""


@pytest.mark.slow  # test_parallelize.py has a job of torchrun among the fast ones
def test_torchrun(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("llama-tiny", "ring=2", "zigzag")
    script, result = tmp_path / "script.py", tmp_path / "outputs.pt"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), folder, str(result)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    module, _ = zoo.build("llama-tiny")
    with torch.no_grad():
        expected = module(torch.arange(13)[None])
    assert difference(torch.load(result), expected) <= TOLERANCE
