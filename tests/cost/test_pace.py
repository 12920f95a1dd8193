"""Seconds measured at different moments of a machine, brought to its best pace."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from ringcompile.cost import clock
from ringcompile.cost.measure import SIZES, measure_device
from ringcompile.cost.pace import Pace


def test_seconds_are_those_of_the_best_pace() -> None:
    """The same work at three paces."""
    pace = Pace()
    assert pace.best == 1.0
    found = [pace.steady(seconds, product) for seconds, product in ((20, 2), (30, 3), (10, 1))]
    assert found == [20.0, 20.0, 20.0]
    assert pace.best == 0.5


def test_figures_of_a_cpu_are_those_of_the_best_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the machine is twice as fast, but for what is timed: rates double, times are halved."""
    monkeypatch.setattr(clock.Clock, "_timed", lambda *_: 1e-3)

    def figures(fastest: range) -> dict[str, float]:
        calls = count()
        monkeypatch.setattr(
            clock, "product_seconds", lambda _: 1.0 if next(calls) in fastest else 2.0
        )
        made = measure_device(torch.device("cpu"), torch.float32, SIZES["quick"])
        return {key: made[key]["value"] for key in ("launch", "scan", "bandwidth")}

    products = 4  # beside each figure
    usual, faster = figures(range(0)), figures(range(products, 2 * products))
    assert faster["launch"] == pytest.approx(usual["launch"] / 2)
    assert faster["scan"] == pytest.approx(usual["scan"] / 2)
    assert faster["bandwidth"] == pytest.approx(usual["bandwidth"] * 2, rel=1e-3)
