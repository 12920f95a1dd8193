"""A finite number in place of scores is a score: real ones may lie below it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.silent.small import CAPTURED, HEADS, VOCABULARY, WIDTH, ids, matches, with_gain
from tests.support import compiled, counts, some_fast

Tensor = torch.Tensor
Hide = Callable[[Tensor, Tensor], Tensor]


def later(scores: Tensor) -> Tensor:
    """Which keys come behind a query."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


class Written(nn.Module):
    """Attention written out; some sequences are padded, one has padding alone.

    Args:
        hide: from scores [B,H,S,S] and the keys that are padding [B,1,1,S] to what softmax takes.
        gain: of the queries; scores have about its size.
    """

    def __init__(self, hide: Hide, gain: float) -> None:
        super().__init__()
        self.hide, self.gain = hide, gain
        self.embedding, self.qkv = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with_gain(self)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for t in self.qkv(self.embedding(tokens)).chunk(3, -1))
        scores = (q * self.gain) @ k.transpose(-1, -2)
        weights = self.hide(scores, ~keep[:, None, None, :]).softmax(-1)
        return self.head((weights @ v).transpose(1, 2).flatten(2))


def inputs(length: int) -> tuple[Tensor, ...]:
    keep = torch.ones(3, length, dtype=torch.bool)
    keep[0, length // 2 :] = False
    keep[1] = False
    return ids(length, 3), keep


# Fills of what is padding, and about how large scores are beside them.
KEPT: dict[str, tuple[Hide, float]] = {
    "-10000": (lambda s, pad: s.masked_fill(pad, -1e4), 6e3),
    "-10000, scores of one": (lambda s, pad: s.masked_fill(pad, -1e4), 1.0),
    "-50": (lambda s, pad: s.masked_fill(pad, -50.0), 20.0),
    "a number above all": (lambda s, pad: torch.where(pad, 3.0, s), 1.0),
    "two numbers": (lambda s, pad: s.masked_fill(pad, -1e4).masked_fill(pad.flip(-1), -2e4), 1e4),
    "behind a bias": (lambda s, pad: (s + torch.arange(s.shape[-1]).double())
                      .masked_fill(pad, -1e4), 6e3),
    "behind a cap": (lambda s, pad: (20 * torch.tanh(s / 20)).masked_fill(pad, -15.0), 30.0),
    "scaled behind it": (lambda s, pad: s.masked_fill(pad, -1e4) * 0.25, 6e3),
    "before causality": (lambda s, pad: s.masked_fill(pad, -1e4)
                         .masked_fill(later(s), -torch.inf), 6e3),
    "added": (lambda s, pad: s + pad.double() * -1e4, 6e3),
    "added per query": (lambda s, pad: s + later(s).double() * -1e4, 6e3),
    "the lowest number": (lambda s, pad: s.masked_fill(pad, torch.finfo(s.dtype).min), 6e3),
    "-1e9": (lambda s, pad: s.masked_fill(pad, -1e9), 6e3),
}
SPECS = ["ring=3", "tp=2", "ulysses=2"]
FAST = ("-10000", "two numbers", "before causality")


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(list(KEPT), SPECS, fast=lambda kind, spec: kind in FAST and spec == "ring=3"),
)
def test_a_number_is_kept(kind: str, spec: str) -> None:
    hide, gain = KEPT[kind]
    matches(Written(hide, gain), spec, inputs, lengths=(27,))


def test_it_is_still_attention() -> None:
    parallel = compiled(Written(*KEPT["-10000"]), inputs(CAPTURED), "ring=3")
    assert counts(parallel, 0)["shift_start"] > 0


_LEAVES_WEIGHT = (
    "-10000 in place of a masked score leaves some attention weight on that key, and which keys "
    "are masked differs from row to row"
)
# What attention's own op has no operand for: keys are gathered, with a note that says why.
BY_ROWS: dict[str, tuple[Hide, str]] = {
    "for later keys": (
        lambda s, pad: s.masked_fill(later(s), -1e4),
        _LEAVES_WEIGHT,
    ),
    "for later keys and padding": (
        lambda s, pad: s.masked_fill(later(s) | pad, -1e4),
        _LEAVES_WEIGHT,
    ),
    "over minus infinity": (
        lambda s, pad: s.masked_fill(later(s), -torch.inf).masked_fill(pad, -1e4),
        "its masked scores are changed afterwards",
    ),
    "before a bias": (
        lambda s, pad: s.masked_fill(pad, -1e4) + torch.arange(s.shape[-1]).double(),
        "its masked scores are changed afterwards",
    ),
}


@pytest.mark.parametrize("gain", [1.0, 6e3])
@pytest.mark.parametrize("kind", some_fast(BY_ROWS, fast=lambda kind: kind == "for later keys"))
def test_what_cannot_be_an_operand_is_computed_row_by_row(kind: str, gain: float) -> None:
    hide, reason = BY_ROWS[kind]
    model = Written(hide, gain)
    matches(model, "ring=3", inputs, lengths=(27,))
    parallel = compiled(model, inputs(CAPTURED), "ring=3")
    assert any(f"({reason})" in note for note in parallel.program.notes)
