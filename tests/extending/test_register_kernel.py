"""An attention kernel of a user's own: taken first, and held to the contract before it is."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ringcompile as rc
from ringcompile.ops.kernels import select
from ringcompile.ops.kernels.contract import BlockCall
from ringcompile.ops.kernels.plain import MATH


@pytest.fixture(autouse=True)
def _providers() -> Iterator[None]:
    before = list(select._PROVIDERS)
    yield
    select._PROVIDERS[:] = before


def takes_all(call: BlockCall) -> str | None:
    return None


def test_it_is_taken_first() -> None:
    calls = []

    def run(call: BlockCall) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return MATH.run(call)

    rc.register_kernel("mine", run, refuses=takes_all, softcap=True)
    assert len({call.q.dtype for call in calls}) == 4
    calls.clear()
    x = torch.randn(1, 2, 4, 8)
    select.attend(x, x, x, scale=1.0)
    assert len(calls) == 1


def half_the_scale(call: BlockCall) -> tuple[Tensor, Tensor]:
    return MATH.run(BlockCall(call.q / 2, call.k, call.v, call.scale, call.causal, call.mask, None))


def blind_rows_zero(call: BlockCall) -> tuple[Tensor, Tensor]:
    out, lse = MATH.run(call)
    return out, lse.masked_fill(lse == -torch.inf, 0.0)


def narrow_lse(call: BlockCall) -> tuple[Tensor, Tensor]:
    out, lse = MATH.run(call)
    return out, lse.bfloat16()


def log2_lse(call: BlockCall) -> tuple[Tensor, Tensor]:
    out, lse = MATH.run(call)
    return out, lse / 0.6931471805599453


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (half_the_scale, "gives another output than plain arithmetic"),
        (blind_rows_zero, "gives another LSE than plain arithmetic for .* a mask"),
        (log2_lse, "gives another LSE than plain arithmetic"),
        (narrow_lse, "LSE"),
    ],
)
def test_a_kernel_that_breaks_the_contract(run: object, message: str) -> None:
    before = select.providers()
    with pytest.raises(rc.RingCompileError, match=message):
        rc.register_kernel("mine", run, refuses=takes_all)  # type: ignore[arg-type]
    assert select.providers() == before


def test_a_name_that_is_taken_and_a_kernel_that_takes_nothing() -> None:
    with pytest.raises(rc.RingCompileError, match="there is an attention provider named 'math'"):
        rc.register_kernel("math", MATH.run, refuses=takes_all)
    with pytest.raises(rc.RingCompileError, match="refuses every call"):
        rc.register_kernel("mine", MATH.run, refuses=lambda call: "no")
