"""Joining a job: a process takes its place among the ranks, or says which ranks are missing."""

from __future__ import annotations

import atexit
import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import ip_address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh
from ringcompile.runtime.links import Links

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
BACKENDS = ("auto", "gloo", "nccl")
JOIN_TIMEOUT = 120.0  # starting 16 processes on 2 busy cores takes a few seconds
_BACKLOG = 2048  # connections of ranks that start at once
_POLL = 0.5  # seconds between two looks at who has joined
_GIVEN_UP = "ringcompile/missing"
_UNCONNECTED = "ringcompile/unconnected"
EXCHANGE_TIMEOUT = 1800.0  # a peer may compute for long between two transfers
_TORCHRUN = frozenset({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})


@dataclass
class Rank:
    """This process' place among the ranks.

    Attributes:
        index: its global rank.
        world_size: the number of ranks.
        device: where its tensors live.
        state: what a call wants to keep in the process for the next call.
        timeout: seconds that it waits for another rank in one exchange.
        devices: the caller's device mesh, whose process groups are used; None to make groups.
        links: to the other ranks, if they are known to be on the same machine.
    """

    index: int
    world_size: int
    device: torch.device
    state: Any = None
    timeout: float = EXCHANGE_TIMEOUT
    devices: DeviceMesh | None = None
    links: Links | None = None


def pick_backend(backend: str, num_ranks: int) -> str:
    """`gloo` or `nccl`; `auto` takes NCCL where every rank of this machine has a GPU of its own.

    Raises:
        RingCompileError: an unknown backend, or fewer GPUs than ranks.
    """
    if backend not in BACKENDS:
        raise RingCompileError(
            f"unknown backend '{backend}'", hint=f"backends are: {', '.join(BACKENDS)}"
        )
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    enough = num_devices >= num_ranks and dist.is_nccl_available()
    if backend == "nccl" and not enough:
        raise RingCompileError(
            f"NCCL needs a GPU for each of the {num_ranks} ranks on this machine, "
            f"there are {num_devices}",
            hint="use the gloo backend, which runs on the CPU",
        )
    return "nccl" if enough and backend != "gloo" else "gloo"


def join_local(
    index: int,
    world_size: int,
    store: Path,
    *,
    backend: str = "auto",
    timeout: float = EXCHANGE_TIMEOUT,
    join_timeout: float = JOIN_TIMEOUT,
    ends: Mapping[int, Connection] | None = None,
) -> Rank:
    """Join the other processes of this machine; listens on the loopback interface only.

    Args:
        index: this process' rank.
        world_size: the number of ranks.
        store: the file through which the ranks find one another; not there yet, or of this job.
        backend: see `pick_backend`.
        timeout: seconds that a rank waits for another in one exchange.
        join_timeout: seconds to wait for the others to join.
        ends: of connections to the other ranks; see `Links`.

    Raises:
        RingCompileError: some ranks did not join.
    """
    os.environ.update(GLOO_SOCKET_IFNAME=LOOPBACK, NCCL_SOCKET_IFNAME=LOOPBACK)
    found = FileStore(str(store), world_size)
    picked = pick_backend(backend, world_size)
    rank = _join(found, index, world_size, index, picked, timeout, join_timeout)
    return replace(rank, links=Links(index, ends or {}, timeout))


def leave() -> None:
    """Leave the job: gloo's threads end with it.

    Where one still runs when the interpreter ends, and lets go of a tensor, the process aborts.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether a launcher started this process as one rank of a job."""
    return os.environ.keys() >= _TORCHRUN


def has_store_of_launcher() -> bool:
    """Whether the launcher holds the store through which the ranks find one another."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def in_job() -> bool:
    """Whether this process is a rank: of a launcher's job, or of a process group that is there."""
    return dist.is_initialized() or under_torchrun()


def join_torchrun(
    mesh: Mesh,
    *,
    backend: str = "auto",
    timeout: float = EXCHANGE_TIMEOUT,
    join_timeout: float = JOIN_TIMEOUT,
) -> Rank:
    """Join the job that `torchrun`, or whatever set its variables, started this process for.

    A process group that the caller has initialised is taken as it is, with its backend.

    Raises:
        RingCompileError: there is no job, it has another size than the mesh, or ranks are missing.
    """
    if dist.is_initialized():
        check_world_size(mesh, dist.get_world_size())
        return Rank(dist.get_rank(), dist.get_world_size(), _device_in_use(), timeout=timeout)
    if not under_torchrun():
        raise RingCompileError(
            f"no job to join: {', '.join(sorted(_TORCHRUN - os.environ.keys()))} not set",
            hint=f"start the ranks with: torchrun --nproc-per-node {mesh.world_size} ...",
        )
    index, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_world_size(mesh, world_size)
    local = int(os.environ.get("LOCAL_RANK", index))
    picked = pick_backend(backend, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    try:
        store = _job_store(index, world_size, timedelta(seconds=join_timeout))
    except (RuntimeError, ValueError) as error:
        raise RingCompileError(
            f"rank {index} cannot reach the job at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {join_timeout:g} s: {first_line(error)}",
            hint="MASTER_ADDR has to be an address of rank 0's host that all others can reach; see "
            "whether rank 0 was started",
        ) from error
    return _join(store, index, world_size, local, picked, timeout, join_timeout)


def _job_store(index: int, world_size: int, timeout: timedelta) -> Store:
    """Where the ranks of a job find one another: torchrun's store, or else rank 0's.

    torch's own rendezvous would wait for everyone to connect, and not say who is missing.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _is_loopback(host):  # then all ranks are here, and nobody else needs to reach them
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    if has_store_of_launcher():
        return next(rendezvous("env://", timeout=timeout))[0]
    listening = _listen(host, port) if index == 0 else None
    return TCPStore(
        host, port, world_size, is_master=index == 0, timeout=timeout, wait_for_workers=False,
        master_listen_fd=listening,
    )


def _is_loopback(host: str) -> bool:
    try:
        return all(ip_address(found[4][0]).is_loopback for found in socket.getaddrinfo(host, None))
    except (OSError, ValueError):
        return False


def _listen(host: str, port: int) -> int | None:
    """A socket for rank 0's store at the address that the others are told, and no other.

    Left to itself the store listens on all interfaces; it does so where the address is not one of
    this host's own, as behind a translation of addresses.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(_BACKLOG)
            return found.detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and not _is_loopback(host):
            return None
        raise RuntimeError(f"rank 0 cannot listen at {host}:{port}: {error.strerror}") from error


def check_world_size(mesh: Mesh, world_size: int) -> None:
    """Refuse a job whose size is not the mesh's."""
    if world_size != mesh.world_size:
        raise RingCompileError(
            f"the program is for {mesh.world_size} ranks ({mesh}), but the job has {world_size}",
            hint=f"start {mesh.world_size} ranks, or transform the model for {world_size}",
        )


def missing_ranks(missing: Iterable[int], timeout: float) -> RingCompileError:
    """The error for ranks that did not join in time."""
    return RingCompileError(
        f"{name_ranks(missing)} did not join within {timeout:g} s",
        hint="see whether their processes, or their hosts, started at all; on slow ones raise the "
        "timeout (--join-timeout)",
    )


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 1, 3`."""
    listed = sorted(ranks)
    return f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the C++ file before it and the stack behind it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S+\.cc:\d+\] ", "", line).partition(" This is typically")[0]


def _join(
    store: Store,
    index: int,
    world_size: int,
    local: int,
    backend: str,
    timeout: float,
    join_timeout: float,
) -> Rank:
    _check_in(store, index, world_size, join_timeout)
    device = _device(backend, local)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=index,
            world_size=world_size,
            timeout=timedelta(seconds=join_timeout),  # who dies here may never be heard of
            device_id=device if backend == "nccl" else None,
        )
    except RuntimeError as error:
        raise RingCompileError(
            f"rank {index} cannot connect to {_unconnected(store, index, world_size)} over "
            f"{backend} within {join_timeout:g} s: {first_line(error)}",
            hint="see whether all ranks still run; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME can "
            "name the network interface to use",
        ) from error
    limit_exchanges(None, timeout)
    atexit.register(leave)
    return Rank(index, world_size, device, timeout=timeout)


def limit_exchanges(group: dist.ProcessGroup | None, timeout: float) -> None:
    """Limit the seconds that an exchange in a group may take; None is the group of all ranks.

    Groups that torch makes for the axes of a mesh would else wait for half an hour.
    """
    _set_pg_timeout(timedelta(seconds=timeout), group)


def _unconnected(store: Store, index: int, world_size: int) -> str:
    """The ranks that do not report that they cannot connect: it is they who are missed."""
    others = [rank for rank in range(world_size) if rank != index]
    try:
        store.set(f"{_UNCONNECTED}/{index}", "1")
        time.sleep(2 * _POLL)
        silent = [rank for rank in others if not store.check([f"{_UNCONNECTED}/{rank}"])]
        time.sleep(2 * _POLL if index == 0 else 0)  # the store may go with rank 0
    except RuntimeError:
        return "rank 0, which holds the job's store,"
    return name_ranks(silent or others)


def _check_in(store: Store, index: int, world_size: int, timeout: float) -> None:
    """Wait until all ranks are here: torch's own error would not say which one is missing.

    Who gives up first says so, and all give up: with rank 0 the store may go.
    """
    keys = [f"ringcompile/joined/{rank}" for rank in range(world_size)]
    deadline = time.monotonic() + timeout
    store.set(keys[index], "1")
    while not _all_there(store, keys, min(_POLL, deadline - time.monotonic())):
        missing = _given_up(store)
        if not missing and time.monotonic() >= deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            store.set(_GIVEN_UP, ",".join(map(str, missing)))
        if missing:
            time.sleep(2 * _POLL if index == 0 else 0)
            raise missing_ranks(missing, timeout)


def _all_there(store: Store, keys: list[str], seconds: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=max(seconds, 0.01)))
    except RuntimeError:
        return False
    return True


def _given_up(store: Store) -> list[int]:
    """The ranks that another one found missing."""
    try:
        if not store.check([_GIVEN_UP]):
            return []
        missing = store.get(_GIVEN_UP).decode()
        return [int(rank) for rank in missing.split(",")] if missing else []
    except RuntimeError as error:
        raise RingCompileError(
            f"the job's store, which is in rank 0, is gone: {first_line(error)}",
            hint="see what rank 0 reports",
        ) from error


def _device_in_use() -> torch.device:
    """Where the process group that is there exchanges tensors: its current GPU over NCCL."""
    over_nccl = "cuda:nccl" in str(dist.get_backend_config()) and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if over_nccl else torch.device("cpu")


def _device(backend: str, local: int) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
