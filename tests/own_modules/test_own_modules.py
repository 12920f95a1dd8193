"""Odd forms of attention and ops in small modules: right, or refused with a reason."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ringcompile.capture.export import capture
from ringcompile.compiler import check, transform
from tests.own_modules.trial import (
    AXES,
    CAPTURED,
    CRASHED,
    ITEMS,
    RIGHT,
    WRONG,
    Odd,
    Trial,
    hidden,
    module,
    trials,
)
from tests.support import compiled, difference, run

SAMPLE = {
    "attention: sigmoid, causal": ("ring=4", "time=2"),
    "attention: talking heads both": ("ulysses=2",),
    "attention: weights returned": ("ring=2,tp=2",),
    "attention: c2p and p2c, as DeBERTa": ("ring=4",),
    "attention: softmax over queries": ("ring=4",),
    "attention: Manhattan distances": ("ring=4", "dp=2"),
    "attention: chosen by an indexer": ("ring=4",),
    "attention: keys gathered by index": ("tp=2",),
    "op: embedding_bag": ("ring=4",),
    "op: max_pool1d": ("ring=4",),
    "op: max_pool1d with indices": ("ring=4",),
    "op: searchsorted": ("dp=2",),
    "op: exp(1 / s)": ("ring=4",),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_right(name: str) -> None:
    assert [(t.outcome, t.text) for t in trials(name, SAMPLE[name])] == [
        (RIGHT, "") for _ in SAMPLE[name]
    ]


def test_what_is_gathered_is_said() -> None:
    """With the line and the bytes, in notes; nothing counts as refused."""
    program = capture(module("attention: sigmoid, causal"), (hidden(CAPTURED),))
    (note,) = (n for n in transform(program, "ring=4").notes if "pairs every token" in n)
    assert re.fullmatch(
        r"attentions\.py:\d+: this pairs every token with every other, but is not a supported "
        r"attention pattern: each rank computes its rows of all pairs, from 128\*b\*s bytes "
        r"gathered "
        r"on every rank", note,
    )
    assert not check(program, "ring=4").refusals


def test_a_range_from_a_fraction() -> None:
    """`arange` counts in floating point where its start or step is no whole number."""

    def item(m: Any, y: Tensor) -> Tensor:
        places = torch.arange(0.5, y.shape[1] * 0.25 + 0.5, 0.25, dtype=y.dtype)
        return y * places[: y.shape[1], None]

    model = Odd(item, behind_attention=True)
    parallel = compiled(model, (hidden(CAPTURED),), "ring=4", length=CAPTURED)
    with torch.no_grad():
        expected = model(hidden(CAPTURED))
    assert difference(run(parallel, (hidden(CAPTURED),)).outputs, expected) < 1e-10


@pytest.fixture(scope="module")
def everything() -> list[Trial]:
    return [trial for name in ITEMS for trial in trials(name)]


@pytest.mark.slow
def test_all_are_right_or_refused(everything: list[Trial]) -> None:
    counts = Counter((trial.spec, trial.outcome) for trial in everything)
    assert not [t for t in everything if t.outcome in (WRONG, CRASHED)]
    mixing = Counter(t.spec for t in everything if "mixes the sequences of a batch" in t.text)
    assert mixing.keys() <= {"dp=2"}  # a loss of the whole batch: no replica has it alone
    for spec in AXES:
        assert counts[spec, RIGHT] >= 0.85 * (len(ITEMS) - mixing[spec]), counts
