"""Numbers with a source: what a hardware table is made of.

A figure is one number or a grid of them over sizes; it says whether it was read in a datasheet,
measured or assumed, where and when. Between the points of a grid it is interpolated in logarithms,
outside it keeps the value at the edge.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, TypeAlias

from ringcompile.errors import RingCompileError

BASES = ("datasheet", "measured", "assumed")
# Unit -> what it measures, and how much of the SI unit it is.
UNITS = {
    "PFLOP/s": ("FLOP/s", 1e15),
    "TFLOP/s": ("FLOP/s", 1e12),
    "GFLOP/s": ("FLOP/s", 1e9),
    "TB/s": ("byte/s", 1e12),
    "GB/s": ("byte/s", 1e9),
    "MB/s": ("byte/s", 1e6),
    "GB": ("byte", 1e9),
    "GiB": ("byte", 2.0**30),
    "MB": ("byte", 1e6),
    "s": ("second", 1.0),
    "ms": ("second", 1e-3),
    "us": ("second", 1e-6),
    "ns": ("second", 1e-9),
    "1": ("fraction", 1.0),
}
Grid: TypeAlias = "float | tuple[Grid, ...]"


@dataclass(frozen=True)
class Figure:
    """One number of a hardware table, or a grid of them, with where it comes from.

    Attributes:
        value: a number in `unit`, or nested tuples with one level for each axis.
        unit: a key of `UNITS`.
        basis: "datasheet", "measured" or "assumed".
        source: which datasheet, which machine and versions, or why it is assumed.
        date: when, as YYYY-MM-DD or a part of it.
        axes: what the value depends on: the name and the points of each axis, increasing.
    """

    value: Grid
    unit: str
    basis: str
    source: str
    date: str
    axes: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __call__(self, **at: float) -> float:
        """The value in SI units at these sizes; sizes that are no axis of it are ignored."""
        return _at(self.value, self.axes, at) * UNITS[self.unit][1]

    def points(self, axis: str) -> tuple[float, ...]:
        """The points of an axis; none where it is no axis of the figure."""
        return dict(self.axes).get(axis, ())

    def highest(self, **at: float) -> float:
        """The largest value in SI units, over all points of the axes that `at` does not fix."""
        free = [[(name, x) for x in points] for name, points in self.axes if name not in at]
        return max(self(**at, **dict(point)) for point in product(*free))

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        made: dict[str, Any] = {"value": _as_lists(self.value), "unit": self.unit,
                                "basis": self.basis, "source": self.source, "date": self.date}
        if self.axes:
            made["axes"] = {name: list(points) for name, points in self.axes}
        return made


def read_figure(data: object, where: str, measures: str, axes: tuple[str, ...]) -> Figure:
    """Read and check a figure of a file.

    Args:
        data: what stands in the file.
        where: the file and the field, for errors.
        measures: what its unit has to measure, such as "byte/s".
        axes: the axes it may have.

    Raises:
        RingCompileError: something is missing, has the wrong type or does not fit together.
    """
    texts = ("unit", "basis", "source", "date")
    if not isinstance(data, dict) or not {"value", *texts} <= data.keys() <= {
        "value", "axes", *texts
    }:
        raise malformed(where, "it must be an object with value, unit, basis, source, date")
    for name in texts:
        if not isinstance(data[name], str) or not data[name]:
            raise malformed(where, f"{name} must be a string")
    if UNITS.get(data["unit"], ("",))[0] != measures:
        fitting = [unit for unit, (kind, _) in UNITS.items() if kind == measures]
        raise malformed(where, f"its unit is '{data['unit']}', not one of {', '.join(fitting)}")
    if data["basis"] not in BASES:
        raise malformed(where, f"its basis is '{data['basis']}', not one of {', '.join(BASES)}")
    points = _read_axes(data.get("axes", {}), where, axes)
    lengths = [len(values) for _, values in points]
    value = _read_grid(data["value"], lengths, where, is_rate=measures.endswith("/s"))
    return Figure(value, data["unit"], data["basis"], data["source"], data["date"], points)


def malformed(where: str, what: str) -> RingCompileError:
    """The error about a field of a hardware file."""
    return RingCompileError(
        f"{where}: {what}",
        hint="`ringcompile calibrate -o FILE` writes a file in this form; "
        "ringcompile/cost/tables has more",
    )


def _read_axes(
    data: object, where: str, allowed: tuple[str, ...]
) -> tuple[tuple[str, tuple[float, ...]], ...]:
    if not isinstance(data, dict) or not data.keys() <= set(allowed):
        names = ", ".join(allowed) or "none"
        raise malformed(where, f"axes has to be an object of lists; possible axes: {names}")
    for name, points in data.items():
        fits = isinstance(points, list) and points and all(map(_is_size, points))
        if not fits or any(a >= b for a, b in pairwise(points)):
            raise malformed(where, f"axis '{name}' has to be a list of increasing numbers above 0")
    return tuple((name, tuple(map(float, points))) for name, points in data.items())


def _read_grid(data: object, lengths: list[int], where: str, *, is_rate: bool) -> Grid:
    if not lengths:
        if not isinstance(data, int | float) or isinstance(data, bool) or not (
            math.isfinite(data) and (data > 0 if is_rate else data >= 0)
        ):
            least = "above 0" if is_rate else "of at least 0"
            raise malformed(where, f"value {data!r} is not a number {least}")
        return float(data)
    if not isinstance(data, list) or len(data) != lengths[0]:
        raise malformed(where, "value has to be a list with an entry for each point of its axis")
    return tuple(_read_grid(entry, lengths[1:], where, is_rate=is_rate) for entry in data)


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _at(
    value: Grid, axes: tuple[tuple[str, tuple[float, ...]], ...], at: Mapping[str, float]
) -> float:
    if not isinstance(value, tuple):
        return value
    (name, points), rest = axes[0], axes[1:]
    size = min(max(at[name], points[0]), points[-1])
    above = bisect_right(points, size)
    low = _at(value[above - 1], rest, at)
    if above == len(points) or size == points[above - 1]:
        return low
    high = _at(value[above], rest, at)
    share = math.log(size / points[above - 1]) / math.log(points[above] / points[above - 1])
    if low <= 0 or high <= 0:
        return low + share * (high - low)
    return low * (high / low) ** share


def _as_lists(value: Grid) -> Any:
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple) else value
