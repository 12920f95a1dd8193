"""What a model computes for padding is thrown away, whatever it is: here NaN.

A length that does not divide is padded by copies of the last token. A count of tokens goes on over
these, so that a square root of the tokens left is NaN for padding, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringcompile.ops import attention as block_attention
from tests.silent.small import CAPTURED, Model, ids, matches
from tests.silent.test_across_tokens import KINDS, attended
from tests.support import some_fast

Between = Callable[[Any, Tensor, Tensor], Tensor]


class Strained(nn.Embedding):
    """An embedding times the square root of how many tokens are left, and a half."""

    def forward(self, tokens: Tensor) -> Tensor:
        count = torch.ones_like(tokens).cumsum(1)
        left = tokens.shape[1] + 0.5 - count.to(self.weight.dtype)
        return super().forward(tokens) * left.sqrt()[..., None]


def near(x: Tensor, tokens: Tensor) -> Tensor:
    n = torch.arange(tokens.shape[1])
    return ((n[:, None] - n).abs() < 5)[None, None]


ATTENTIONS: dict[str, Between] = {
    "causal": lambda m, x, _: attended(x, x, x, is_causal=True),
    "both ways": lambda m, x, _: attended(x, x, x),
    "a window": lambda m, x, tokens: attended(x, x, x, attn_mask=near(x, tokens)),
    "hidden keys": lambda m, x, tokens: attended(
        x, x, x, attn_mask=(tokens % 5 > 0)[:, None, None] | near(x, tokens)),
    "a bias": lambda m, x, tokens: attended(
        x, x, x, attn_mask=(tokens[:, None, :, None] * tokens[:, None, None]).double() / 500),
    "sigmoid": lambda m, x, _: (x @ x.transpose(1, 2)).sigmoid() @ x / x.shape[1],
    "convolved": lambda m, x, _: F.conv1d(
        x.transpose(1, 2), m.up.weight[:32, :, None].expand(-1, -1, 3), padding=1).transpose(1, 2),
}
MIXED = {name: (between, {}) for name, between in ATTENTIONS.items()} | {
    name: entry for name, entry in KINDS.items() if name != "over all tokens"}  # no padding there
NO_ONE_TOKEN = {"chosen tokens", "deviation"}  # four of one, and a deviation of one: NaN itself
SPECS = ["ring=4", "ring=2,ulysses=2", "ring=2,tile=2", "ring=2,tp=2", "time=2"]
FAST = {("causal", "ring=4"), ("causal", "time=2"), ("hidden keys", "ring=2,tile=2"),
        ("convolved", "ring=4"), ("linear attention", "ring=4")}


def model_of(kind: str) -> Model:
    between, made = MIXED[kind]
    model = Model(between, **{name: make() for name, make in made.items()})
    strained = Strained(*model.embedding.weight.shape).double()
    strained.load_state_dict(model.embedding.state_dict())
    model.embedding = strained
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "spec", "order"),
    some_fast(
        MIXED, SPECS, ["contiguous", "auto"],
        fast=lambda kind, spec, order: (kind, spec) in FAST and order == (
            "contiguous" if len(kind) % 2 else "auto"),
    ),
)
def test_nothing_is_left_of_it(kind: str, spec: str, order: str) -> None:
    lengths = (27, 5) if kind in NO_ONE_TOKEN else (27, 5, 1)
    matches(model_of(kind), spec, lambda n: (ids(n),), lengths, order=order)


def test_a_fault_on_purpose_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "_cleared", lambda x, tokens: x)
    with pytest.raises(AssertionError, match="ring=4 at 27"):
        matches(model_of("causal"), "ring=4", lambda n: (ids(n),), lengths=(27,))
    matches(model_of("causal"), "ring=4", lambda n: (ids(n),), lengths=(CAPTURED,))
