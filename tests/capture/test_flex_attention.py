"""flex_attention: its masks and score functions are read as attention, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    AuxRequest,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from ringcompile.errors import RingCompileError
from tests.support import difference, run, some_fast

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
HEADS, DIM, CAPTURED, LENGTH = 4, 8, 13, 22


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q - k <= 4


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k < 3


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 2 * torch.tanh(score / 2)


def relative(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + (q - k).abs() * -0.1


def causal_score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


class Flex(nn.Module):
    def __init__(self, mask: Any = None, score: Any = None, groups: int = 1, **more: Any) -> None:
        super().__init__()
        self.mask, self.score, self.groups, self.more = mask, score, groups, more
        self.q = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.kv = nn.Linear(HEADS * DIM, HEADS * DIM // groups)
        self.slopes = nn.Parameter(torch.tensor([0.1, 0.3, 0.6, 1.0]))

    def alibi(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + self.slopes[h] * (k - q)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        q, k = (f(x * 2).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.kv))
        mask = self.mask
        if documents is not None:
            def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (documents[b, q] == documents[b, k]) & (q >= k)
        length, blocks = x.shape[1], None
        if mask is not None:
            batch = None if documents is None else x.shape[0]
            blocks = create_block_mask(mask, batch, None, length, length, device="cpu")
        score = self.alibi if self.score == "alibi" else self.score
        out = flex_attention(q, k, k.sin(), score, blocks, enable_gqa=self.groups > 1, **self.more)
        return out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]


def x(length: int) -> Tensor:
    return torch.randn(2, length, HEADS * DIM, generator=torch.Generator().manual_seed(length))


READ: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "full"),
    "causal": ({"mask": causal}, "causal"),
    "window": ({"mask": and_masks(causal, window)}, "causal window 5"),
    "prefix": ({"mask": or_masks(causal, prefix)}, "full + prefix"),
    "grouped heads": ({"mask": causal, "groups": 2}, "causal"),
    "scale": ({"mask": causal, "scale": 0.9}, "causal"),
    "soft cap": ({"mask": causal, "score": soft_cap}, "causal + soft cap 2"),
    "relative": (
        {"mask": causal, "score": relative}, "causal + relative bias f32[1, 1, s/ring, s]"
    ),
    "alibi": ({"mask": causal, "score": "alibi"}, ""),
    "causal by scores": ({"score": causal_score}, "causal"),
}


FAST = {"alibi"}  # a window is read as that of a mask of documents, below


@pytest.mark.parametrize("name", some_fast(READ, fast=FAST.__contains__))
def test_read_as_attention(name: str) -> None:
    options, says = READ[name]
    module = Flex(**options).eval()
    program = capture(module, (x(CAPTURED),))
    assert program.notes == ()
    assert program.length_range[1] is None
    parallel = transform(program, "ring=3")
    masks = [report.mask for report in attention_of(parallel.program)]
    assert len(masks) == 1
    assert not says or masks[0] == says
    with torch.no_grad():
        expected = module(x(LENGTH))
    assert difference(run(parallel, (x(LENGTH),)).outputs, expected) < 2e-5


def test_documents() -> None:
    """The mask function reads a tensor by sequence and position."""
    def documents(length: int) -> Tensor:
        return torch.stack([torch.arange(length) // 7, torch.arange(length) // 5])

    module = Flex().eval()
    parallel = transform(capture(module, (x(CAPTURED), documents(CAPTURED))), "ring=3")
    given = (x(LENGTH), documents(LENGTH))
    with torch.no_grad():
        expected = module(*given)
    assert difference(run(parallel, given).outputs, expected) < 2e-5


@pytest.mark.parametrize("more", [{"return_aux": AuxRequest(lse=True)}])
def test_more_than_the_output_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RingCompileError) as caught:
        capture(Flex(**more).eval(), (x(CAPTURED),))
    assert caught.value.message == (
        "flex_attention is called to also return its log-sum-exps or largest scores, which is not "
        "supported"
    )


@pytest.mark.slow
def test_torchs_module_is_as_before() -> None:
    flex: Callable[..., Any] = flex_attention
    before = dict(flex.__globals__)  # type: ignore[attr-defined]
    capture(Flex(causal).eval(), (x(CAPTURED),))
    after = flex.__globals__  # type: ignore[attr-defined]
    assert {k for k in before if before[k] is not after[k]} <= {"_WARNINGS_SHOWN"}
