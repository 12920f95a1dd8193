"""What tests share: a module is captured once, and never mistaken for another."""

from __future__ import annotations

import math

import torch
from torch import nn

from ringcompile.compiler import transform
from ringcompile.ir.serialize import program_to_json
from tests.support import captured, difference, run


def test_a_module_is_captured_once_for_the_same_inputs_and_weights() -> None:
    module, x = nn.Linear(4, 4).eval(), torch.randn(1, 6, 4)
    first = captured(module, (x,))
    assert captured(module, (x.clone(),)) is first
    assert captured(module, (x + 1,)) is not first
    assert captured(module, (x[:, :5],)) is not first
    assert captured(module, (), {"input": x}) is not first
    assert captured(nn.Linear(4, 4).eval(), (x,)) is not first
    with torch.no_grad():
        module.weight.mul_(2)
    second = captured(module, (x,))
    assert second is not first
    assert captured(module.double(), (x.double(),)) is not second


def test_what_is_captured_stays_as_it_is() -> None:
    """Whatever is made of it, for any mesh: else one test would see what another did."""
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 6, 8)
    program = captured(block, (x,))
    before = program_to_json(program)
    for spec in ("ring=2", "tp=2", "ulysses=2", "time=2"):
        run(transform(program, spec), (x,))
        assert program_to_json(program) == before


def test_nan_is_no_small_difference_wherever_it_stands() -> None:
    right, nan = torch.ones(3), torch.full((3,), math.nan)
    for found in ((right, nan), (nan, right), (right, nan, right)):
        expected = (right,) * len(found)
        assert math.isnan(difference(found, expected))
        assert math.isnan(difference(expected, found))
    assert difference((right, right + 0.5), (right, 2 * right)) == 0.25
