"""Hardware tables: every number has a source; a malformed file is refused by field and reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ringcompile.cost.figures import UNITS, Figure, read_figure
from ringcompile.cost.hardware import TABLES, cluster_names, load_cluster, read_cluster
from ringcompile.cost.measure import padded
from ringcompile.errors import RingCompileError
from tests.cost.clusters import cluster, device, figure, link, table


@pytest.mark.parametrize("name", ["cpu", "h100x16", "h100x8x2", "h200x16"])
def test_shipped_clusters_load(name: str) -> None:
    assert name in cluster_names()
    found = load_cluster(name)
    for figures in (found.device.figures, *(one.figures for one in found.links.values())):
        for key, one in figures.items():
            assert one.source, key
            assert one.date[:2] == "20", key
            assert one.unit in UNITS, key


def test_shapes_of_the_clusters() -> None:
    assert (load_cluster("h100x16").num_nodes, load_cluster("h100x16").per_node) == (1, 16)
    two = load_cluster("h100x8x2")
    assert (two.num_nodes, two.per_node) == (2, 8)
    assert two.link(0, 7) is two.links["node"]
    assert two.link(7, 8) is two.links["between"]


def test_every_number_of_a_shipped_table_says_where_it_is_from() -> None:
    """Nothing but the two counts of a cluster is a bare number."""

    def bare(value: Any, inside: bool) -> int:
        if isinstance(value, dict):
            known = inside or {"value", "unit", "basis", "source", "date"} <= value.keys()
            return sum(bare(v, known) for v in value.values())
        if isinstance(value, list):
            return sum(bare(v, inside) for v in value)
        return int(isinstance(value, int | float) and not isinstance(value, bool) and not inside)

    for path in TABLES.glob("*.json"):
        data = json.loads(path.read_text())
        counts = [data.pop(name, None) for name in ("nodes", "devices_per_node")]
        assert bare(data, False) == 0, path.name
        assert all(count is None or isinstance(count, int) for count in counts)


def test_figures_are_interpolated_in_logarithms() -> None:
    one = Figure(((1.0, 4.0), (16.0, 64.0)), "TFLOP/s", "measured", "x", "2026",
                 (("rows", (1.0, 100.0)), ("width", (10.0, 1000.0))))
    assert one(rows=1, width=10) == 1e12
    assert one(rows=100, width=1000) == pytest.approx(64e12)
    assert one(rows=10, width=10) == pytest.approx(4e12)  # half way between 1 and 16
    assert one(rows=1, width=100) == pytest.approx(2e12)
    assert one(rows=0.01, width=1e9) == pytest.approx(4e12)  # beyond the edge: as at the edge
    assert one.points("width") == (10.0, 1000.0)


def test_figures_are_read_as_they_are_written() -> None:
    for figures in (load_cluster("h200x16").device.figures, load_cluster("cpu").device.figures):
        for one in figures.values():
            axes = tuple(name for name, _ in one.axes)
            assert read_figure(one.to_json(), "x", UNITS[one.unit][0], axes) == one


def test_a_dtype_without_figures_takes_its_twin() -> None:
    found = load_cluster("h100x16").device
    assert found.get("matmul", torch.bfloat16) == found.get("matmul", torch.float16)
    with pytest.raises(RingCompileError, match="has no figure for matmul in float64") as error:
        found.get("matmul", torch.float64)
    assert "calibrate --dtype float64" in str(error.value)


def test_clusters_grow_by_nodes() -> None:
    assert load_cluster("h100x8x2").sized(1024).num_nodes == 128
    assert load_cluster("h100x16").sized(4).per_node == 4
    with pytest.raises(RingCompileError, match="2 x 8 devices, 12 are asked for"):
        load_cluster("h100x8x2").sized(12)
    alone = cluster(per_node=2, links={"node": link()})
    with pytest.raises(RingCompileError, match="1 x 2 devices, 4 are asked for") as error:
        alone.sized(4)
    assert "no link between nodes" in str(error.value)


def test_an_unknown_cluster_is_named() -> None:
    with pytest.raises(RingCompileError, match="unknown cluster 'h1000'") as error:
        load_cluster("h1000")
    assert "h100x16" in str(error.value)
    assert "calibrate" in str(error.value)


def changed(path: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = copy.deepcopy(table())
    at = data
    *steps, last = path.split("/")
    for step in steps:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return data


MALFORMED: list[tuple[str, Any, str]] = [
    ("format", "other", "its format is 'other', not 'ringcompile-hardware-1'"),
    ("title", None, "see title"),
    ("title", 3, "title: it must be a string"),
    ("nodes", 0, "nodes: 0 is not a number of at least 1"),
    ("nodes", True, "nodes: True is not a number"),
    ("links", [], "links: it must be an object"),
    ("links/node", None, "there is no link within a node"),
    ("links/node/bandwidth", None, "links.node.bandwidth: it is missing"),
    ("links/node/colour", figure(1.0, "GB/s"), "links.node.colour: there is no such field"),
    ("device", 3, "device: it must be an object or the name of a table"),
    ("device", "h900", "there is no table 'h900'"),
    ("device/asynchronous", "yes", "asynchronous: it must be true or false"),
    ("device/figures/memory", None, "figures.memory: it is missing"),
    ("device/figures/memory", 80, "figures.memory: it must be an object with value, unit"),
    ("device/figures/memory", figure(80.0, "GB/s"), "its unit is 'GB/s', not one of GB, GiB, MB"),
    ("device/figures/memory", figure("80", "GB"), "value '80' is not a number of at least 0"),
    ("device/figures/memory", figure(-1.0, "GB"), "value -1.0 is not a number"),
    ("device/figures/memory", figure(float("nan"), "GB"), "value nan is not a number"),
    ("device/figures/memory", {**figure(1.0, "GB"), "basis": "guessed"}, "its basis is 'guessed'"),
    ("device/figures/memory", {**figure(1.0, "GB"), "source": ""}, "source must be a string"),
    ("device/figures/stream", figure([1.0], "GB/s", bytes=[1.0, 2.0]), "an entry for each point"),
    ("device/figures/stream", figure([1.0, 2.0], "GB/s", bytes=[2.0, 1.0]), "increasing numbers"),
    ("device/figures/stream", figure([1.0], "GB/s", rows=[1.0]), "possible axes: bytes"),
    ("device/figures/launch.float16", figure(1.0, "us"), "there is no such field"),
]


@pytest.mark.parametrize(("path", "value", "message"), MALFORMED,
                         ids=[f"{path}-{i}" for i, (path, _, _) in enumerate(MALFORMED)])
def test_a_malformed_table_is_refused_by_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(RingCompileError) as error:
        read_cluster(changed(path, value), "mine.json")
    assert message in str(error.value)
    assert "mine.json" in str(error.value) or "h900" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot read"), ("[]", "it must be an object"), ("", "cannot read")],
)
def test_a_file_that_is_no_table(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(RingCompileError, match=message):
        load_cluster(file)


@pytest.mark.parametrize("make", [device, link, table], ids=["device", "link", "table"])
def test_the_tables_of_the_tests_are_fine(make: Callable[[], dict[str, Any]]) -> None:
    assert json.loads(json.dumps(make())) == make()


def test_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(table(nodes=3)))
    assert load_cluster(str(file)).num_devices == 24


def test_fewer_rows_take_no_longer_than_more() -> None:
    """Of 1, 2 and 4 rows the second was caught by something: it could have been padded to 4."""
    assert padded([1, 2, 4], [[1.0, 9.0], [0.1, 9.0], [8.0, 9.0]]) == [
        [2.0, 9.0], [4.0, 9.0], [8.0, 9.0]]


@pytest.mark.parametrize(("field", "value"), [("bandwidth", 0.0), ("launch", 0.0)])
def test_a_rate_is_above_zero(field: str, value: float) -> None:
    """Seconds may be 0: a launch that costs nothing; a rate of 0 would take for ever."""
    unit = {"bandwidth": "GB/s", "launch": "us"}[field]
    data = table()
    data["device"] = device(figures={field: figure(value, unit)})
    if field == "launch":
        read_cluster(data, "mine.json")
        return
    with pytest.raises(RingCompileError, match=r"bandwidth: value 0.0 is not a number above 0"):
        read_cluster(data, "mine.json")
