"""What calls are timed behind on a CPU, when samples are enough, and what figures they become."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ringcompile import calibration
from ringcompile.cost import clock
from ringcompile.cost.clock import Clock, settled
from ringcompile.cost.collectives import collective_seconds
from ringcompile.cost.figures import Figure
from ringcompile.cost.hardware import Cluster, Device, Link, load_cluster
from ringcompile.cost.kernels import Kernel, time_of
from ringcompile.cost.measure import SIZES, measure_device, slower
from ringcompile.cost.rank import TimedCollective
from ringcompile.cost.work import product

CPU, FLOAT = torch.device("cpu"), torch.float32


def measured(value: Any, unit: str, **axes: tuple[float, ...]) -> Figure:
    return Figure(value, unit, "measured", "a test", "2026", tuple(axes.items()))


def cpu(**figures: Figure) -> Device:
    device = load_cluster("cpu").device
    named = {key.replace("_float32", ".float32"): one for key, one in figures.items()}
    return replace(device, figures={**device.figures, **named})


def samples_taken(monkeypatch: pytest.MonkeyPatch, times: list[float]) -> list[str]:
    """What happens while a call is timed that takes so long, time after time."""
    done, taken = list[str](), iter(times)

    def timed(*_: Any) -> float:
        done.append("call")
        return next(taken)

    def product_timed(_: int) -> float:
        done.append("product")
        return 1e-3

    monkeypatch.setattr(Clock, "_timed", timed)
    monkeypatch.setattr(Clock, "_one_row", lambda _: done.append("row"))
    monkeypatch.setattr(clock, "product_seconds", product_timed)
    Clock(CPU, 0.0, 9).seconds(lambda _: None)
    return done


def test_a_short_call_comes_behind_matmuls_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    done = samples_taken(monkeypatch, [3e-3, *[1e-4] * 20])
    products = ["product", "product"]
    assert done == ["call", "call", *products, *["row", "call"] * 4, *products]


def test_a_long_call_comes_behind_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert samples_taken(monkeypatch, [3e-3] * 20) == [
        "call", "call", "product", *["call", "product"] * 4
    ]


def test_the_longest_calls_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert samples_taken(monkeypatch, [0.5, 0.4]) == ["call", "product", "call", "product"]


def test_samples_that_do_not_agree_are_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert samples_taken(monkeypatch, [1e-4 * (1 + i % 5) for i in range(20)]).count("row") == 9


@pytest.mark.parametrize(("samples", "enough"), [
    ([1.0, 1.0, 1.0], False), ([1.0, 1.04, 9.0, 1.0], True), ([1.0, 1.1, 1.2, 1.3], False),
    ([5.0, 1.0, 1.01, 1.02, 9.0, 1.0, 1.0, 1.0], True),
])
def test_samples_agree_where_their_middle_half_does(samples: list[float], enough: bool) -> None:
    assert settled(samples) is enough


def test_weights_lie_as_programs_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column, as sessions with a cache store what is read faster so."""
    strides, linear = set[tuple[int, int]](), F.linear

    def seen(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[0] == weight.shape[1]:
            strides.add(weight.stride())  # type: ignore[arg-type]
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", seen)
    made = measure_device(CPU, FLOAT, SIZES["quick"])
    assert strides == {(1, width) for width in SIZES["quick"].widths}
    assert len(made["attention_cached"]["value"]) == len(SIZES["quick"].cached)


def test_a_query_over_a_cache_has_a_figure_of_its_own() -> None:
    kernel = Kernel("attention_cached", FLOAT, 1 << 20)
    figure = measured((1.0, 4.0), "GB/s", bytes=(1 << 18, 1 << 22))
    assert time_of(kernel, cpu(attention_cached=figure)).seconds == pytest.approx(2.0**20 / 2e9)
    copied = 2.0**20 / load_cluster("cpu").device.value("bandwidth")
    assert time_of(kernel, load_cluster("cpu").device).seconds == pytest.approx(copied)


def test_weights_are_read_as_fast_as_was_measured() -> None:
    """Faster than memory is copied, where so few rows were measured; else not."""
    row, bandwidth = product(1, 1, 1024, 1024, FLOAT), measured(1.0, "GB/s")
    for least, seconds in ((1, row.flops / 10e9), (16, row.num_bytes / 1e9)):
        rates = measured(((10.0,),), "GFLOP/s", rows=(least,), width=(1024,))
        found = time_of(row, cpu(matmul_float32=rates, bandwidth=bandwidth))
        assert (found.seconds, found.bound) == (pytest.approx(seconds), "weights")


@pytest.mark.parametrize("kind", ["gather", "all_reduce", "reduce_scatter", "all_to_all"])
def test_small_collectives_have_a_figure_of_their_own(kind: str) -> None:
    slow = load_cluster("cpu")
    small = measured((100.0, 200.0), "us", bytes=(1024, 4096))
    link = Link("node", {**slow.links["node"].figures, "small": small})
    fast = Cluster(slow.name, slow.title, slow.device, 1, 2, {"node": link})
    little = TimedCollective(kind, "", (0, 1), 1024)
    assert collective_seconds(fast, little) == pytest.approx(100e-6)
    large = TimedCollective(kind, "", (0, 1), 5000)
    assert collective_seconds(fast, large) == collective_seconds(slow, large)


def test_passes_end_with_the_time_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(step=20)
    monkeypatch.setattr(calibration.time, "monotonic", lambda: next(seconds))

    def passes(most: int, limit: float) -> int:
        work = calibration.Probe(CPU, FLOAT, "quick", most, limit)
        return len(calibration._passes(work, lambda: None))

    assert passes(5, float("inf")) == 5
    assert passes(5, 30.0) == 2
    assert passes(5, 0.0) == 1


def test_what_is_no_time_or_rate_stays() -> None:
    units = {"us": 3.0, "GB/s": 1 / 3, "GFLOP/s": 1 / 3, "GB": 1.0, "1": 1.0}
    for unit, factor in units.items():
        made = slower({"value": [6.0], "unit": unit}, 3.0)["value"]
        assert made == [pytest.approx(6.0 * factor)], unit
