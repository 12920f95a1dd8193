"""Several hosts: a network namespace each, on one machine; skipped where these cannot be made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from tests.runtime.hosts import PORT, ROOT, Host, two_hosts, why_not
from tests.support import TOLERANCE, difference, zoo_program

_REASON = why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
NAME, SPEC, LENGTH = "llama-tiny", "ring=2,tp=2", 13


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both
        assert [host.processes() for host in both] == [[], []]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[ParallelProgram, Path]:
    folder = tmp_path_factory.mktemp("hosts")
    parallel = transform(zoo_program(NAME), SPEC)
    parallel.save(folder / "program")
    _, (tokens,) = zoo.build(NAME, sequence=LENGTH)
    save_file({parallel.program.inputs[0].name: tokens}, folder / "inputs.safetensors")
    return parallel, folder


def torchrun(first: Host, index: int, *more: str) -> list[str]:
    """Two ranks on each of two hosts."""
    return [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
        "--node-rank", str(index), "--master-addr", first.address, "--master-port", PORT, *more,
    ]


def ringcompile(folder: Path, *more: str) -> list[str]:
    return ["-m", "ringcompile", "run", str(folder / "program"), "--backend", "gloo",
            "--inputs", str(folder / "inputs.safetensors"), *more]


def place(first: Host, rank: int) -> dict[str, str]:
    """What torchrun, or any other launcher, tells a rank of two hosts with two ranks each."""
    return {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": first.address, "MASTER_PORT": PORT}


@pytest.mark.slow
def test_two_hosts(hosts: tuple[Host, Host], saved: tuple[ParallelProgram, Path]) -> None:
    parallel, folder = saved
    command = ringcompile(folder, "--outputs", str(folder / "outputs.safetensors"), "--json")
    jobs = [host.start(torchrun(hosts[0], i) + command) for i, host in enumerate(hosts)]
    said = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    module, inputs = zoo.build(NAME, sequence=LENGTH)
    alone = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs)
    assert json.loads(said[0][0])["bytes_sent"] == alone.bytes_sent
    assert said[1][0] == ""  # rank 0 reports for all
    found = load_file(folder / "outputs.safetensors")["output"]
    with torch.no_grad():
        assert difference(found, module(*inputs)) <= TOLERANCE
    assert torch.equal(found, alone.outputs)


@pytest.mark.slow  # what is said is tested in one place by test_distributed.py
def test_a_host_that_never_joins(
    hosts: tuple[Host, Host], saved: tuple[ParallelProgram, Path], within
) -> None:
    """Both ranks of the host that is there say who is missing, and end."""
    command = ringcompile(saved[1], "--join-timeout", "8")
    with within(90):
        jobs = [hosts[0].start(command, place(hosts[0], rank)) for rank in (0, 1)]
        said = [job.communicate(timeout=80) for job in jobs]
    for out, error in said:
        assert out == ""
        assert "error: ranks 2, 3 did not join within 8 s\n  hint: see whether" in error
        assert "Traceback" not in error
    assert [job.returncode for job in jobs] == [1, 1]


@pytest.mark.slow  # what is said is tested in one place by test_distributed.py
def test_a_first_host_that_never_starts(
    hosts: tuple[Host, Host], saved: tuple[ParallelProgram, Path], within
) -> None:
    command = ringcompile(saved[1], "--join-timeout", "3")
    with within(60):
        job = hosts[1].start(command, place(hosts[0], 2))
        _, error = job.communicate(timeout=50)
    message = rf"error: rank 2 cannot reach the job at {hosts[0].address}:{PORT} within 3 s: "
    assert re.search(message + r".*\n  hint: MASTER_ADDR has to be", error), error
    assert job.returncode == 1


def _other(parallel: ParallelProgram, what: str, folder: Path) -> dict[str, str]:
    """Write what the second host has instead, as `folder`/program; what its ranks are told."""
    model = {"program": "gpt-tiny"}.get(what, NAME)
    module, args = zoo.build(model)
    if what == "weights":
        with torch.no_grad():
            next(module.parameters()).mul_(2)
    transform(capture(module, args), SPEC).save(folder / "program")
    names = [spec.name for spec in parallel.program.inputs]
    save_file({name: torch.arange(LENGTH)[None] for name in names}, folder / "inputs.safetensors")
    if what != "version":
        return {}
    lines = ["from importlib import metadata", "metadata.version = lambda name: '0.0.7'"]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [("weights", "artifact"), ("program", "artifact"), ("version", "ringcompile")],
)
def test_hosts_that_have_something_else(
    hosts: tuple[Host, Host], saved: tuple[ParallelProgram, Path], tmp_path: Path,
    what: str, said: str,
) -> None:
    """Refused on every rank before the first number."""
    more = _other(saved[0], what, tmp_path)
    jobs = [
        hosts[rank // 2].start(
            ringcompile(saved[1] if rank < 2 else tmp_path),
            {**place(hosts[0], rank), **(more if rank > 1 else {})},
        ) for rank in range(4)
    ]
    for job in jobs:
        out, error = job.communicate(timeout=200)
        assert out == ""
        assert re.search(rf"error: ranks 2, 3 run another {said} than rank 0: \S+, rank 0 has \S+"
                         r"\n  hint: give all hosts the same copy of the artifact", error), error
        assert "Traceback" not in error
        assert job.returncode == 1


@pytest.mark.slow
def test_a_host_that_torchrun_misses(
    hosts: tuple[Host, Host], saved: tuple[ParallelProgram, Path], within
) -> None:
    """torchrun itself waits for the other host, says so and ends."""
    waits = ["--rdzv-conf", "timeout=5,join_timeout=5,read_timeout=5"]
    with within(60):
        job = hosts[0].start(torchrun(hosts[0], 0, *waits) + ringcompile(saved[1]))
        _, error = job.communicate(timeout=50)
    assert "1/2 clients joined" in error
    assert job.returncode == 1


@pytest.mark.slow
def test_a_host_that_is_lost(
    hosts: tuple[Host, Host], saved: tuple[ParallelProgram, Path], within
) -> None:
    """The other host's ranks end too, and name who they lost."""
    length = ["--seq", "20000"]
    command = ["-m", "ringcompile", "run", str(saved[1] / "program"), "--backend", "gloo", *length]
    with within(150):
        jobs = [hosts[rank // 2].start(command, place(hosts[0], rank)) for rank in range(4)]
        while len(hosts[0].processes(0)) < 2 or not _connected(hosts[0]):
            assert all(job.poll() is None for job in jobs), [job.communicate() for job in jobs]
        for job in jobs[2:]:
            job.kill()
        said = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs[:2]] == [1, 1]
    assert any(re.search(r"error: rank \d lost ranks? [\d, ]+", text) for text in said[:2]), said


def _connected(host: Host) -> bool:
    """Whether more than the store's connections lead to the other host."""
    job = host.start(["-c", "print(open('/proc/net/tcp').read())"])
    rows = [row.split() for row in job.communicate()[0].splitlines()[1:] if row.strip()]
    other = "02004D0A"
    return sum(row[3] == "01" and row[2].startswith(other) for row in rows) > 4
