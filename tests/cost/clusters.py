"""Hardware for tests: round numbers, so that what is expected can be worked out by hand."""

from __future__ import annotations

from typing import Any

from ringcompile.cost.hardware import FORMAT, Cluster, read_cluster


def figure(value: Any, unit: str, **axes: list[float]) -> dict[str, Any]:
    made = {"value": value, "unit": unit, "basis": "assumed", "source": "a test", "date": "2026"}
    return {**made, "axes": axes} if axes else made


def device(**changes: Any) -> dict[str, Any]:
    """1 TFLOP/s, 1 TB/s, a launch of 1 us: seconds can be read off sizes."""
    rates = ("matmul.float32", "attention.float32", "attention_causal.float32",
             "attention_masked.float32")
    figures = {
        "memory": figure(16.0, "GB"),
        "reserved": figure(1.0, "GB"),
        "bandwidth": figure(1.0, "TB/s"),
        **{name: figure(1.0, "TFLOP/s") for name in rates},
        **{name: figure(1.0, "TB/s") for name in ("stream", "strided", "special", "reduction")},
        "launch": figure(1.0, "us"),
        "issue": figure(10.0, "us"),
        **changes.pop("figures", {}),
    }
    return {"format": FORMAT, "name": "test", "title": "a device", "asynchronous": True,
            "figures": figures, **changes}


def link(**changes: Any) -> dict[str, Any]:
    """1 GB/s, 1 ms to start, 0.1 ms a further hop."""
    return {
        "startup": figure(1.0, "ms"),
        "latency": figure(0.1, "ms"),
        "bandwidth": figure(1.0, "GB/s"),
        "interference": figure(0.0, "1"),
        **changes,
    }


def table(per_node: int = 8, nodes: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "format": FORMAT, "name": "test", "title": "a cluster", "device": device(),
        "nodes": nodes, "devices_per_node": per_node,
        "links": {"node": link(), "between": link(bandwidth=figure(0.1, "GB/s"))},
        **changes,
    }


def cluster(per_node: int = 8, nodes: int = 1, **changes: Any) -> Cluster:
    return read_cluster(table(per_node, nodes, **changes), "test.json")
