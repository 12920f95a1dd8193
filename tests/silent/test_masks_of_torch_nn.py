"""torch.nn's own transformers with a mask, and a second sequence beside the first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.silent.small import EXACT, HEADS, VOCABULARY, WIDTH, ids, matches, normal, with_gain
from tests.support import captured, compiled, difference, run, some_fast

_MASK = nn.Transformer.generate_square_subsequent_mask


def hidden_later(length: int) -> torch.Tensor:
    """True where a key is hidden from a query."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class OfTorch(nn.Module):
    """Embedding, a module of torch.nn that is called as `how` says, head."""

    def __init__(self, module: nn.Module, how: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding, self.module = nn.Embedding(VOCABULARY, WIDTH), module
        self.head, self.how = nn.Linear(WIDTH, VOCABULARY), how
        with_gain(self)

    def forward(self, tokens: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return self.head(self.how(self.module, self.embedding(tokens), *more))


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), 2)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True), 1)


def with_memory(length: int) -> tuple[torch.Tensor, ...]:
    return ids(length), normal(2, 9, WIDTH)


ALONE = {
    "float mask": lambda m, x: m(x, mask=_MASK(x.shape[1], dtype=x.dtype)),
    "boolean mask": lambda m, x: m(x, mask=hidden_later(x.shape[1])),
    "another mask": lambda m, x: m(x, mask=hidden_later(x.shape[1]).triu(3)),
    "with padding": lambda m, x: m(
        x, mask=hidden_later(x.shape[1]), src_key_padding_mask=x[..., 0] > 1e9
    ),
    "said to be causal": lambda m, x: m(x, mask=hidden_later(x.shape[1]), is_causal=True),
}


@pytest.mark.parametrize("form", some_fast(ALONE, fast=lambda form: form == "with padding"))
def test_encoder(form: str) -> None:
    """The mask is used as it is given; nothing looks into it while the model is captured."""
    matches(OfTorch(_encoder(), ALONE[form]), "ring=2")


def test_decoder() -> None:
    model = OfTorch(_decoder(), lambda m, x, memory: m(x, memory, tgt_mask=_MASK(
        x.shape[1], dtype=x.dtype)))
    matches(model, "ring=2", inputs=with_memory)


@pytest.mark.slow  # the encoder and the decoder, each of which is among the fast ones
def test_both() -> None:
    module = nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True)
    model = OfTorch(module, lambda m, x, source: m(source, x, tgt_mask=hidden_later(x.shape[1])))
    matches(model, "tp=2", inputs=with_memory)


def test_features_of_the_length_are_no_tokens() -> None:
    """A feature size that equals the example's length stays when fewer tokens are tried."""
    model = OfTorch(_decoder(), lambda m, x, memory: m(x, memory, tgt_mask=hidden_later(
        x.shape[1])))
    example = (ids(WIDTH), normal(2, 9, WIDTH))
    assert captured(model, example).length_range == (1, None)
    parallel, given = compiled(model, example, "ring=2"), with_memory(1)
    with torch.no_grad():
        assert difference(run(parallel, given).outputs, model(*given)) <= EXACT
