"""Two hosts on one machine: network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORT = "29500"  # nobody else lives in these namespaces


@dataclass(frozen=True)
class Host:
    """A network of its own, with one way out."""

    name: str
    interface: str
    address: str

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Run Python with these arguments on this host."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                 "GLOO_SOCKET_IFNAME": self.interface, **(environment or {})},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def processes(self, seconds: float = 5.0) -> list[str]:
        """The processes that are still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while (found := _ip("netns", "pids", self.name).split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def why_not() -> str | None:
    """Why there can be no hosts here."""
    if shutil.which("ip") is None:
        return "needs the `ip` command (iproute2) to make network namespaces"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    try:
        with two_hosts():
            return None
    except RuntimeError as error:
        return f"cannot make network namespaces: {error}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other, and nothing else."""
    mark = f"{os.getpid()}"
    hosts = tuple(Host(f"rc{mark}{x}", f"rc{x}{mark}", f"10.77.0.{i + 1}")
                  for i, x in enumerate("ab"))
    a, b = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", a.interface, "netns", a.name, "type", "veth",
            "peer", "name", b.interface, "netns", b.name)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield a, b
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"ip {' '.join(arguments)} failed")
    return done.stdout
