"""Torch's operators that are run in another way compute what torch computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringcompile.ops import bindings
from ringcompile.ops.bodies import body_of, cumsum_along_memory
from tests.ir.cases import CASES
from tests.ir.draws import Draws
from tests.ir.rule_check import target_of

aten = torch.ops.aten
KINDS = (torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", [None, torch.int32])
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_running_sum_along_memory(
    kind: torch.dtype, dim: int, dtype: torch.dtype | None
) -> None:
    x = torch.randint(0, 2, (5, 37, 3)).to(kind)
    found, expected = cumsum_along_memory(x, dim, dtype), aten.cumsum.default(x, dim, dtype=dtype)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", bindings.FUNCTIONS)
@settings(max_examples=8, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_function_of_torch_is_its_operator(name: str, data: st.DataObject) -> None:
    args, kwargs = CASES[name].make(Draws(data.draw))
    found, expected = body_of(target_of(name))(*args, **kwargs), target_of(name)(*args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == expected.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("kind", [*KINDS, torch.float32])
def test_a_running_sum_on_a_gpu(kind: torch.dtype, dim: int) -> None:
    x = torch.randint(0, 2, (32768, 8)).to(kind)
    found = body_of(aten.cumsum.default)(x.cuda(), dim)
    assert torch.equal(found.cpu(), x.cumsum(dim))
