"""Devices, links and clusters as the cost model sees them, read from JSON tables.

`tables/` has the ones that come with ringcompile; `load_cluster` also takes a user's own file,
such as one that `ringcompile calibrate` wrote. What is missing or malformed is refused by name:
nothing is filled in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringcompile.cost.figures import Figure, malformed, read_figure
from ringcompile.errors import RingCompileError

if TYPE_CHECKING:
    import torch

FORMAT = "ringcompile-hardware-1"
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Field:
    """What a table may say: what it measures, over which axes, for each dtype or for all."""

    measures: str
    axes: tuple[str, ...] = ()
    by_dtype: bool = False
    needed: bool = False


DEVICE_FIELDS = {
    "memory": Field("byte", needed=True),
    "reserved": Field("byte", needed=True),  # what the driver and libraries take of it
    "bandwidth": Field("byte/s", needed=True),  # of device memory, bytes read plus written
    "peak": Field("FLOP/s", by_dtype=True),  # what the datasheet says, to compare with
    "matmul": Field("FLOP/s", ("rows", "width"), by_dtype=True),  # rows x width x width
    "attention": Field("FLOP/s", ("head_dim", "length"), by_dtype=True),
    "attention_causal": Field("FLOP/s", ("head_dim", "length"), by_dtype=True),  # visible pairs
    "attention_masked": Field("FLOP/s", ("head_dim", "length"), by_dtype=True),  # with a mask
    "attention_cached": Field("byte/s", ("bytes",)),  # keys and values read by one query
    "stream": Field("byte/s", ("bytes",), by_dtype=True, needed=True),  # add, mul, copy
    "strided": Field("byte/s", ("bytes",), by_dtype=True, needed=True),  # permuted copies
    "special": Field("byte/s", ("bytes",), by_dtype=True, needed=True),  # exp, tanh, gelu, cos
    "reduction": Field("byte/s", ("bytes",), by_dtype=True, needed=True),  # norms, softmax, sums
    "scan": Field("second"),  # a step of a running sum along other than the last dim
    "launch": Field("second", needed=True),  # the least time that a kernel takes on the device
    "issue": Field("second", needed=True),  # what a node costs the host beside or before it
}
LINK_FIELDS = {
    "startup": Field("second", needed=True),  # of an operation, whatever its size
    "latency": Field("second", needed=True),  # of each further hop
    "bandwidth": Field("byte/s", ("bytes",), needed=True),  # each way, by bytes of a message
    "interference": Field("fraction", needed=True),  # of a transfer, lost to the compute beside it
    "peak": Field("byte/s"),
    # Bus bandwidths: bytes that a ring algorithm would send a rank, over the time it really took.
    "all_reduce": Field("byte/s", ("bytes",)),
    "all_gather": Field("byte/s", ("bytes",)),  # and reduce-scatter
    "all_to_all": Field("byte/s", ("bytes",)),
    # Of a small collective as programs have them, by the bytes that each rank brings.
    "small": Field("second", ("bytes",)),
}
# Where a table has no figure for a dtype, its twin has the same figures.
_TWINS = {"bfloat16": "float16", "float16": "bfloat16"}


@dataclass(frozen=True)
class Device:
    """One GPU, or what one rank has of a CPU.

    Attributes:
        name: the name of its table.
        title: what it is.
        asynchronous: whether the host runs ahead of the device.
        figures: by field, or by field and dtype as in "matmul.float16".
    """

    name: str
    title: str
    asynchronous: bool
    figures: Mapping[str, Figure]

    def get(self, field: str, dtype: torch.dtype | None = None) -> Figure:
        """The figure of a field.

        Raises:
            RingCompileError: the table has no figure for it.
        """
        name = str(dtype).removeprefix("torch.")
        for key in (f"{field}.{name}", f"{field}.{_TWINS.get(name, name)}", field):
            if key in self.figures:
                return self.figures[key]
        known = [key for key in self.figures if key.partition(".")[0] == field]
        raise RingCompileError(
            f"hardware '{self.name}' has no figure for {field} in {name}",
            hint=f"it has {', '.join(known) or 'no such figure'}; `ringcompile calibrate --dtype "
            f"{name}` measures it",
        )

    def value(self, field: str) -> float:
        """A figure that depends on nothing, in SI units."""
        return self.get(field)()

    def optional(self, field: str) -> float:
        """The same, or 0 where the table has no figure for it."""
        return self.value(field) if field in self.figures else 0.0


@dataclass(frozen=True)
class Link:
    """How two devices reach each other.

    Attributes:
        name: "node" within a node, "between" across nodes.
        figures: by field.
    """

    name: str
    figures: Mapping[str, Figure]

    def value(self, field: str) -> float:
        """A figure that depends on nothing, in SI units."""
        return self.figures[field]()

    def seconds(self, num_bytes: float) -> float:
        """The time that so many bytes take on the way, startup not counted."""
        return num_bytes / self.figures["bandwidth"](bytes=num_bytes) if num_bytes else 0.0


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices; ranks are numbered node by node.

    Attributes:
        name: the name of its table.
        title: what it is.
        device: each of its devices.
        num_nodes: how many nodes.
        per_node: devices of a node.
        links: by name: "node", and "between" where there are several nodes.
    """

    name: str
    title: str
    device: Device
    num_nodes: int
    per_node: int
    links: Mapping[str, Link]

    @property
    def num_devices(self) -> int:
        """All of its devices."""
        return self.num_nodes * self.per_node

    def node_of(self, rank: int) -> int:
        """The node that a rank runs on."""
        return rank // self.per_node

    def link(self, a: int, b: int) -> Link:
        """The link between two ranks."""
        return self.links["node" if self.node_of(a) == self.node_of(b) else "between"]

    def sized(self, num_devices: int) -> Cluster:
        """The cluster with so many devices: fewer of them, or more nodes of the same kind.

        Raises:
            RingCompileError: more than it has, and no link between nodes.
        """
        if num_devices <= self.per_node:
            return Cluster(self.name, self.title, self.device, 1, num_devices, self.links)
        if num_devices % self.per_node or (num_devices > self.num_devices and not self._grows):
            raise RingCompileError(
                f"cluster '{self.name}' has {self.num_nodes} x {self.per_node} devices, "
                f"{num_devices} are asked for",
                hint="a cluster can be extended by whole nodes only, if its table has a link "
                     "between nodes"
                if self._grows else "its table has no link between nodes; name another cluster",
            )
        nodes = num_devices // self.per_node
        return Cluster(self.name, self.title, self.device, nodes, self.per_node, self.links)

    @property
    def _grows(self) -> bool:
        return "between" in self.links


def cluster_names() -> list[str]:
    """The clusters that come with ringcompile."""
    return sorted(path.stem for path in TABLES.glob("*.json") if "device" in _read(path))


@lru_cache
def load_cluster(name: str | Path) -> Cluster:
    """A cluster by name, or from a user's own file.

    Raises:
        RingCompileError: there is no such cluster, or the file is malformed.
    """
    path = TABLES / f"{name}.json"
    if str(name) not in cluster_names():
        path = Path(name)
        if not path.is_file():
            raise RingCompileError(
                f"unknown cluster '{name}'",
                hint=f"clusters: {', '.join(cluster_names())}; or a file that `ringcompile "
                "calibrate -o FILE` wrote",
            )
    return read_cluster(_read(path), path.name)


def read_cluster(data: dict[str, Any], where: str) -> Cluster:
    """Read and check a cluster's table.

    Args:
        data: what stands in the file; `device` is an object, or the name of a table.
        where: the file, for errors.

    Raises:
        RingCompileError: a field is missing, unknown or malformed.
    """
    _check_head(data, where, {"device", "nodes", "devices_per_node", "links"})
    for name in ("nodes", "devices_per_node"):
        count = data[name]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise malformed(f"{where}: {name}", f"{count!r} is not a number of at least 1")
    links = data["links"]
    if not isinstance(links, dict) or not links.keys() <= {"node", "between"}:
        raise malformed(f"{where}: links", "it must be an object with node and between")
    if data["devices_per_node"] > 1 and "node" not in links:
        raise malformed(f"{where}: links", "there is no link within a node")
    if data["nodes"] > 1 and "between" not in links:
        raise malformed(f"{where}: links", "there is no link between nodes")
    return Cluster(
        data["name"],
        data["title"],
        read_device(data["device"], where),
        data["nodes"],
        data["devices_per_node"],
        {name: Link(name, _read_fields(link, f"{where}: links.{name}", LINK_FIELDS))
         for name, link in links.items()},
    )


def read_device(data: object, where: str) -> Device:
    """Read and check a device's table, or take the one of that name; raises as `read_cluster`."""
    if isinstance(data, str):
        path = TABLES / f"{data}.json"
        if not path.is_file():
            raise malformed(f"{where}: device", f"there is no table '{data}'")
        data, where = _read(path), path.name
    if not isinstance(data, dict):
        raise malformed(f"{where}: device", "it must be an object or the name of a table")
    _check_head(data, where, {"asynchronous", "figures"})
    if not isinstance(data["asynchronous"], bool):
        raise malformed(f"{where}: asynchronous", "it must be true or false")
    figures = _read_fields(data["figures"], f"{where}: figures", DEVICE_FIELDS)
    return Device(data["name"], data["title"], data["asynchronous"], figures)


def _check_head(data: dict[str, Any], where: str, fields: set[str]) -> None:
    expected = {"format", "name", "title", *fields}
    if data.get("format") != FORMAT:
        raise malformed(where, f"its format is {data.get('format')!r}, not '{FORMAT}'")
    if data.keys() != expected:
        wrong = ", ".join(sorted(data.keys() ^ expected))
        raise malformed(where, f"it must have exactly {', '.join(sorted(expected))}: see {wrong}")
    for name in ("name", "title"):
        if not isinstance(data[name], str) or not data[name]:
            raise malformed(f"{where}: {name}", "it must be a string")


def _read_fields(data: object, where: str, fields: Mapping[str, Field]) -> dict[str, Figure]:
    if not isinstance(data, dict):
        raise malformed(where, "it must be an object")
    read = {}
    for key, entry in data.items():
        name, _, dtype = str(key).partition(".")
        field = fields.get(name)
        if field is None or (dtype and not field.by_dtype):
            raise malformed(f"{where}.{key}", f"there is no such field; {', '.join(fields)}")
        read[key] = read_figure(entry, f"{where}.{key}", field.measures, field.axes)
    for name, field in fields.items():
        if field.needed and not any(key.partition(".")[0] == name for key in read):
            raise malformed(f"{where}.{name}", "it is missing")
    return read


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RingCompileError(f"cannot read '{path}': {error}") from None
    if not isinstance(data, dict):
        raise malformed(path.name, "it must be an object")
    return data
