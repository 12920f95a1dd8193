"""Measuring this machine: its kernels, copies, launches and links, as a hardware table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, TypeVar

import click
import torch

from ringcompile.cost.collectives import num_steps
from ringcompile.cost.figures import UNITS, Figure
from ringcompile.cost.hardware import FORMAT, Cluster, load_cluster, read_cluster
from ringcompile.cost.measure import SIZES, measure_device, slower
from ringcompile.errors import RingCompileError
from ringcompile.runtime.join import Rank
from ringcompile.runtime.memory import keep_freed_memory
from ringcompile.runtime.processes import Processes
from ringcompile.runtime.speed import LinkSizes, link_seconds, node_seconds

# Seconds after which no further pass over a CPU's figures begins, unless a number was asked for.
_AGAIN = 30.0
_Found = TypeVar("_Found")
_Pick: TypeAlias = Callable[[list[float]], float]


@dataclass(frozen=True)
class Calibration:
    """A hardware table, and what was measured for it in words."""

    table: dict[str, Any]
    about: str


def measure(
    device: str,
    dtype: str | None,
    base: str | None,
    threads: int,
    ranks: int | None,
    passes: int | None,
    quick: bool,
) -> Calibration:
    """A hardware table of this machine, as `ringcompile calibrate` writes it.

    Args:
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        dtype: of what is measured; by default float16 on a GPU, float32 on a CPU.
        base: a cluster or file to take over what is not measured from.
        threads: of a rank, on a CPU.
        ranks: to measure links between; by default 2, or the number of GPUs.
        passes: how often all is measured; by default once on a GPU, and on a CPU up to 3 times, as
            long as half a minute has not passed.
        quick: a dry run on small sizes.

    Raises:
        RingCompileError: there is no such device or base.
    """
    place = _place(device)
    name = dtype or ("float16" if place.type == "cuda" else "float32")
    ranks = ranks or (torch.cuda.device_count() if place.type == "cuda" else 2)
    seconds = inf if passes else _AGAIN
    passes = passes or (1 if quick or place.type == "cuda" else 3)
    work = Probe(place, getattr(torch, name), "quick" if quick else place.type, passes, seconds)
    figures, links = _measure(work, ranks, threads)
    title = device_title(place)
    if place.type != "cuda":
        title = f"{threads} {'thread' if threads == 1 else 'threads'} of {title}"
    found = {"node": links} if links else {}
    taken = load_cluster(base) if base else None
    table = cluster_table(place, figures, found, taken, (1, ranks), title)
    read_cluster(table, "what was measured")
    about = f"{len(figures)} figures of {title}, {len(links)} of links between {ranks} ranks"
    return Calibration(table, about)


def _place(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RingCompileError("there is no CUDA device", hint="use --device cpu")
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


@dataclass(frozen=True)
class Probe:
    """What to measure: where, of which dtype, a key of `SIZES`, and how often.

    On a CPU no pass begins later than so many seconds after the first one.
    """

    place: torch.device
    dtype: torch.dtype
    sizes: str
    passes: int
    seconds: float = inf


def _measure(work: Probe, ranks: int, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of a device and of the links; on a CPU all ranks compute at once, as they will.

    More threads than CPUs get each their share of the time: `measure_device` has figures of the
    best pace that it sees, at which a thread has a CPU for itself.
    """
    if work.place.type == "cuda":
        figures = usual([device_figures(work) for _ in range(work.passes)])
        return figures, _link_figures(work, ranks, None) if ranks > 1 else {}
    with Processes(ranks, backend="gloo", threads=threads) as processes:
        passes = _passes(work, lambda: worst(processes.call(_rank_figures, work)))
        times = max(1.0, ranks * threads / _num_cpus())
        figures = {key: slower(figure, times) for key, figure in usual(passes).items()}
        return figures, _link_figures(work, ranks, processes) if ranks > 1 else {}


def _passes(work: Probe, measured: Callable[[], _Found]) -> list[_Found]:
    """What is measured, as often as is wanted, or as there is time for; once at least."""
    started, passes = time.monotonic(), [measured()]
    while len(passes) < work.passes and time.monotonic() < started + work.seconds:
        passes.append(measured())
    return passes


def _num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rank_figures(rank: Rank, work: Probe) -> dict[str, Any]:
    keep_freed_memory()
    return device_figures(work, quiet=rank.index > 0)


def device_figures(work: Probe, *, quiet: bool = False) -> dict[str, Any]:
    """The figures of a device, measured by the process that calls."""
    def report(field: str) -> None:
        if not quiet:
            click.echo(f"  {field}", err=True)

    figures = measure_device(work.place, work.dtype, SIZES[work.sizes], report)
    figures["issue"] = {"value": round(node_seconds(work.place) * 1e6, 3), "unit": "us"}
    figures["memory"] = {"value": round(_memory(work.place) / 1e9, 2), "unit": "GB"}
    return figures


def usual(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Each figure as the median of several measurements has it."""
    return _picked(list(found), median, median)


def worst(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Each figure as the slowest of all ranks has it."""
    return _picked(list(found), max, min)


def _picked(found: list[dict[str, Any]], of_seconds: _Pick, of_rates: _Pick) -> dict[str, Any]:
    made = {}
    for key, first in found[0].items():
        if not all(key in one for one in found):
            continue  # could not be measured once
        measures = UNITS[first["unit"]][0]
        pick = of_seconds if measures in ("second", "fraction") else of_rates
        made[key] = {**first, "value": _combined([one[key]["value"] for one in found], pick)}
    return made


def _combined(values: list[Any], pick: _Pick) -> Any:
    if isinstance(values[0], list):
        return [_combined(list(entries), pick) for entries in zip(*values, strict=True)]
    return pick(values)


def _memory(place: torch.device) -> int:
    if place.type == "cuda":
        return torch.cuda.get_device_properties(place).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _link_figures(work: Probe, ranks: int, processes: Processes | None) -> dict[str, Any]:
    sizes = link_sizes(quick=work.sizes == "quick")
    click.echo(f"  links between {ranks} ranks", err=True)
    if processes is not None:
        found = usual_links(_passes(work, lambda: processes.call(link_seconds, sizes)))
    else:
        with Processes(ranks, backend="nccl") as made:
            found = usual_links([made.call(link_seconds, sizes) for _ in range(work.passes)])
    return link_figures(found, sizes, ranks)


def link_sizes(*, quick: bool) -> LinkSizes:
    """What to exchange in order to measure a link; few and small ones for a dry run."""
    return LinkSizes((4096, 65536), (256, 4096), 2) if quick else LinkSizes()


def link_figures(found: list[dict[str, Any]], sizes: LinkSizes, ranks: int) -> dict[str, Any]:
    """The figures of a link, from the seconds of the slowest rank.

    Args:
        found: what `link_seconds` returned on every rank.
        sizes: what was exchanged.
        ranks: how many exchanged with one another.
    """
    startup = max(entry["startup"] for entry in found)
    share = (ranks - 1) / ranks
    # What a ring algorithm would send a rank, as a multiple of the tensor.
    sent = {"shift": 1.0, "all_reduce": 2 * share, "all_gather": share, "all_to_all": share}
    figures: dict[str, Any] = {
        field: {"value": round(startup * 1e6, 3), "unit": "us"} for field in ("startup", "latency")
    }
    for kind, times in sent.items():
        slowest = [max(entry[kind][i] for entry in found) for i in range(len(sizes.messages))]
        # What is left of the time when it has begun, and gone from step to step.
        begun = startup * (1 if kind == "shift" else 1 + num_steps(kind, ranks))
        rates = [times * n / max(seconds - begun, seconds / 10) / 1e9
                 for n, seconds in zip(sizes.messages, slowest, strict=True)]
        figures["bandwidth" if kind == "shift" else kind] = {
            "value": [float(f"{rate:.4g}") for rate in rates], "unit": "GB/s",
            "axes": {"bytes": list(sizes.messages)},
        }
    figures["small"] = {
        "value": [round(max(entry["small"][i] for entry in found) * 1e6, 3)
                  for i in range(len(sizes.small))],
        "unit": "us", "axes": {"bytes": list(sizes.small)},
    }
    worst = max(entry["interference"] for entry in found)
    figures["interference"] = {"value": round(worst, 4), "unit": "1"}
    return figures


def usual_links(passes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each rank's seconds as the median of passes has them."""
    return [
        {key: _combined([one[key] for one in of_rank], median) for key in of_rank[0]}
        for of_rank in zip(*passes, strict=True)
    ]


def cluster_table(
    place: torch.device,
    figures: dict[str, Any],
    links: dict[str, Any],
    base: Cluster | None,
    shape: tuple[int, int],
    title: str,
) -> dict[str, Any]:
    """A hardware table of what was measured.

    Args:
        place: the device.
        figures: of it.
        links: by name ("node" within a node, "between" nodes), their figures.
        base: a cluster to take over what was not measured from.
        shape: nodes, and devices of each.
        title: of the device.
    """
    source, date = _source(place, title), datetime.date.today().isoformat()

    def marked(found: dict[str, Any]) -> dict[str, Any]:
        return {k: {**f, "basis": "measured", "source": source, "date": date}
                for k, f in found.items()}

    old = base.device.figures if base else {}
    kept = {"reserved": _assumed(0.0, "GB", "nothing taken off", date), **_as_json(old)}
    made = {n: _as_json(link.figures) for n, link in base.links.items()} if base else {}
    made |= {name: {**made.get(name, {}), **marked(found)} for name, found in links.items()}
    nodes, per_node = shape
    return {
        "format": FORMAT,
        "name": base.name if base else place.type,
        "title": base.title if base else f"{nodes * per_node} x {title}",
        "device": {
            "format": FORMAT,
            "name": base.device.name if base else place.type,
            "title": title,
            "asynchronous": place.type == "cuda",
            "figures": {**kept, **marked(figures)},
        },
        "nodes": base.num_nodes if base else nodes,
        "devices_per_node": base.per_node if base else per_node,
        "links": made,
    }


def _as_json(figures: Any) -> dict[str, Any]:
    return {key: figure.to_json() for key, figure in figures.items()}


def _assumed(value: float, unit: str, why: str, date: str) -> dict[str, Any]:
    return Figure(value, unit, "assumed", why, date).to_json()


def device_title(place: torch.device) -> str:
    """What the device is called."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line),
                 platform.processor() or platform.machine())
    return f"{model} with {os.cpu_count()} cores"


def _source(place: torch.device, title: str) -> str:
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if place.type == "cuda":
        versions += f", CUDA {torch.version.cuda}"
    return f"ringcompile calibrate on {title}, {versions}"


def to_text(table: dict[str, Any]) -> str:
    """A table as JSON with one line for each list of numbers."""
    return _indented(table, 0)


def _indented(value: Any, depth: int) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    if not value:
        return "{}"
    inner = "  " * (depth + 1)
    lines = [f"{inner}{json.dumps(key)}: {_indented(entry, depth + 1)}"
             for key, entry in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + "  " * depth + "}"
