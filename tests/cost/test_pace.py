"""Seconds measured at different moments of a machine, brought to its best pace."""

from __future__ import annotations

from functools import partial
from itertools import count

import pytest
import torch

from ringcompile.cost import measure
from ringcompile.cost.measure import SIZES, measure_device
from ringcompile.cost.pace import Pace


def test_seconds_are_those_of_the_best_pace() -> None:
    """The same work at three paces; one changes in between."""
    products = iter([2.0, 2.0, 3.0, 3.0, 1.0, 3.0])
    pace = Pace(lambda: next(products))
    assert pace.best == 1.0
    found = [pace.steady(lambda s=seconds: s) for seconds in (20.0, 30.0, 20.0)]
    assert found == pytest.approx([20.0, 20.0, 20.0])
    assert pace.best == 1.0
    products = iter([1.0, 1.0])
    pace.steady(lambda: 10.0)
    assert pace.best == 0.5


def test_figures_of_a_cpu_are_those_of_the_best_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the machine is twice as fast, but for what is timed: rates double, times are halved."""
    monkeypatch.setattr(measure.Clock, "_timed", lambda *_: 1e-3)

    def figures(fastest: int | None) -> dict[str, float]:
        calls = count()
        pace = Pace(lambda: 1.0 if next(calls) // 2 == fastest else 2.0)
        monkeypatch.setattr(measure, "Clock", partial(measure.Clock, pace=pace))
        made = measure_device(torch.device("cpu"), torch.float32, SIZES["quick"])
        monkeypatch.undo()
        monkeypatch.setattr(measure.Clock, "_timed", lambda *_: 1e-3)
        return {key: made[key]["value"] for key in ("launch", "scan", "bandwidth")}

    usual, faster = figures(None), figures(5)
    assert faster["launch"] == pytest.approx(usual["launch"] / 2)
    assert faster["scan"] == pytest.approx(usual["scan"] / 2)
    assert faster["bandwidth"] == pytest.approx(usual["bandwidth"] * 2, rel=1e-3)
