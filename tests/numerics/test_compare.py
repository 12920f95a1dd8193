"""What counts as a difference: by each output's own scale, row by row, and NaN always."""

from __future__ import annotations

import math

import pytest
import torch

from ringcompile.numerics.compare import compare


def differs(found: torch.Tensor, expected: torch.Tensor, **options: torch.Tensor) -> str:
    mismatches = compare({"y": found}, {"y": expected}, **options)[1]
    return mismatches[0].text if mismatches else ""


def test_equal_outputs_do_not_differ() -> None:
    x = torch.randn(2, 5, 3)
    assert compare({"y": x}, {"y": x.clone()}) == (0.0, [])
    assert differs(x + 1e-7, x) == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_differs(value: float) -> None:
    x = torch.ones(2, 5, 3)
    y = x.clone()
    y[1, 4, 2] = value
    assert "at [1, 4, 2] the ranks give " in differs(y, x)
    off, _ = compare({"y": y}, {"y": x})
    assert off == math.inf


def test_all_of_an_output_that_is_nan_differs() -> None:
    assert differs(torch.full((2, 3), math.nan), torch.ones(2, 3))


def test_infinities_have_to_agree() -> None:
    x = torch.tensor([[1.0, math.inf, -math.inf]])
    assert differs(x.clone(), x) == ""
    assert differs(-x, x)
    assert differs(torch.tensor([[1.0, 2.0, -math.inf]]), x)


def test_a_small_output_beside_a_large_one_has_its_own_scale() -> None:
    large, small = torch.full((2, 3), 1e6), torch.full((2, 3), 1e-3)
    found = {"a": large, "b": small * 1.01}
    mismatches = compare(found, {"a": large, "b": small})[1]
    assert [m.output for m in mismatches] == ["b"]


def test_a_small_row_beside_large_ones_has_its_own_scale() -> None:
    x = torch.tensor([[1000.0, 1000.0], [1.0, 1.0]])
    y = x.clone()
    y[1, 0] += 1e-3
    assert "at [1, 0] the ranks give 1.001, the model 1: 1.0e-03" in differs(y, x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_whole_numbers_have_to_be_equal(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 1], [1, 1, 1]]).to(dtype)
    y = x.clone()
    y[1, 2] = 0
    assert differs(x.clone(), x) == ""
    assert "at [1, 2] the ranks give 0, the model 1; it has to be the same" in differs(y, x)


def test_a_scalar_output_is_compared() -> None:
    assert differs(torch.tensor(1.0), torch.tensor(1.0)) == ""
    assert "at [0]" in differs(torch.tensor(1.1), torch.tensor(1.0))


def test_shapes_dtypes_and_numbers_of_outputs_have_to_agree() -> None:
    x = torch.ones(2, 3)
    assert "float32 [3, 2], the model's is float32 [2, 3]" in differs(x.T, x)
    assert "float64" in differs(x.double(), x)
    assert compare({"a": x}, {"a": x, "b": x})[1][0].text == (
        "the ranks give 1 outputs, the model 2")


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_what_padding_gives_is_nobodys_concern(shape: tuple[int, ...]) -> None:
    real = torch.tensor([[True, True, False], [True, True, True]])
    x = torch.ones(shape)
    y = x.clone()
    y[0, 2] = math.nan
    assert differs(y, x, real=real) == ""
    assert differs(y, x)
    y[1, 2] = 5
    assert "at [1, 2" in differs(y, x, real=real)
