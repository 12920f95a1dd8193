"""Every kind of op on a split sequence gives the single device's numbers, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile.errors import RingCompileError
from tests.support import compiled, difference, run, some_fast

H, W = 12, torch.linspace(-1, 1, 12 * 12).reshape(12, 12)
TABLE = torch.linspace(-2, 2, 64 * 12).reshape(64, 12)


class Lambda(nn.Module):
    """A function as a module, over hidden states [B, S, 12]."""

    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", TABLE)

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2)


def attend(x: torch.Tensor, **options: object) -> torch.Tensor:
    y = F.scaled_dot_product_attention(heads(x), heads(x) * 0.5, heads(x) - 1, **options)  # type: ignore[arg-type]
    return y.transpose(1, 2).reshape(x.shape)


def index(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])


def causal(x: torch.Tensor) -> torch.Tensor:
    return index(x)[:, None] >= index(x)[None, :]


CASES: dict[str, Callable[[torch.Tensor], object]] = {
    "pointwise": lambda x: (x * 2 + 1).tanh().clamp(-0.5, 0.5),
    "linear": lambda x: F.linear(x, W),
    "flatten tokens": lambda x: F.linear(x.reshape(-1, H), W).view(x.shape),
    "flat output": lambda x: x.reshape(-1, H) * 3,
    "layer norm": lambda x: F.layer_norm(x, (H,)),
    "softmax over features": lambda x: x.softmax(-1),
    "softmax over tokens": lambda x: x.softmax(1),
    "cumsum over tokens": lambda x: x.cumsum(1),
    "mean over tokens": lambda x: x.mean(1),
    "mean over tokens, kept": lambda x: x - x.mean(1, keepdim=True),
    "mean over all": lambda x: x.mean(),
    "max over tokens": lambda x: x.amax(1),
    "first token": lambda x: x[:, 0],
    "last token": lambda x: x[:, -1],
    "last token, kept": lambda x: F.linear(x[:, -1:, :], W),
    "all but the first": lambda x: x[:, 1:] - x[:, :-1],
    "every other token": lambda x: x[:, ::2],
    "prefix token": lambda x: torch.cat([x.new_ones(x.shape[0], 1, H), x], 1) * 2,
    "shift by one": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1] if False else torch.cat(
        [torch.zeros(x.shape[0], 1, H), x[:, :-1]], 1) + x,
    "flip": lambda x: x.flip(1) + x,
    "positions": lambda x: x + index(x)[None, :, None],
    "positions from one": lambda x: x * (index(x) + 1)[None, :, None],
    "positions, strided": lambda x: x + torch.arange(3, 3 + 2 * x.shape[1], 2)[None, :, None],
    "positions counted over the batch": lambda x: x + torch.arange(
        2 * x.shape[1]).view(2, -1)[:, :, None],
    "positions of flat tokens": lambda x: x.reshape(-1, H) + torch.arange(2 * x.shape[1])[:, None],
    "positions, backwards": lambda x: x + torch.arange(x.shape[1] - 1, -1, -1)[:, None],
    "position table": lambda x: x + TABLE[: x.shape[1]],
    "position lookup": lambda x: x + F.embedding(index(x), TABLE),
    "length as a number": lambda x: x / x.shape[1],
    "split features": lambda x: x.split(4, -1)[1] * x.chunk(3, -1)[0],
    "unbind heads": lambda x: torch.stack(heads(x).unbind(1), 2).flatten(2),
    "permute": lambda x: heads(x).permute(2, 0, 1, 3).contiguous(),
    "transpose tokens and features": lambda x: x.transpose(1, 2).relu().transpose(1, 2),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "masked fill by position": lambda x: x.masked_fill((index(x) % 3 == 0)[None, :, None], 0.0),
    "ones like": lambda x: x + torch.ones_like(x) + x.new_zeros(x.shape[1], 1),
    "expand": lambda x: x[:, :, None, :].expand(-1, -1, 2, -1).reshape(*x.shape[:2], -1),
    "convolution along tokens": lambda x: F.conv1d(
        x.transpose(1, 2), W[:, :, None].expand(-1, -1, 3), padding=1).transpose(1, 2),
    "repeat all entries": lambda x: x.repeat_interleave(2),
    "padding": lambda x: F.pad(x, (0, 0, 2, 1)),
    "sort": lambda x: x.sort(1),
    "largest tokens": lambda x: x.topk(2, 1),
    "largest features": lambda x: x.topk(3, -1),
    "max over tokens, with its place": lambda x: x.max(1),
    "one-hot": lambda x: F.one_hot(x.argmax(-1), H),
    "einsum over features": lambda x: torch.einsum("bsh,oh->bso", x, W),
    "einsum over tokens": lambda x: torch.einsum("bsh,bsk->bhk", x, x),
    "windows of tokens": lambda x: x.unfold(1, 3, 2),
    "write in place": lambda x: torch.zeros_like(x).index_add_(1, index(x).flip(0), x),
    "write a token": lambda x: x.clone().index_fill_(1, torch.tensor([3]), 0.0),
    "chosen values": lambda x: x.reshape(-1)[x.reshape(-1) > 0],
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat features": lambda x: x.repeat_interleave(2, -1),
    "two-dim positions": lambda x: x + torch.stack(
        torch.meshgrid(index(x), torch.arange(H), indexing="ij")).sum(0),
    "complex rotation": lambda x: torch.view_as_real(
        torch.view_as_complex(x.view(*x.shape[:2], -1, 2)) * torch.polar(
            torch.ones(x.shape[1], H // 2), index(x)[:, None] * torch.ones(H // 2))).flatten(2),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 3).transpose(1, 2),
    "Fourier": lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real,
    "attention without heads": lambda x: F.scaled_dot_product_attention(
        x, x * 0.5, x - 1, attn_mask=causal(x)[None]),
    "attention behind prefix tokens": lambda x: attend(
        torch.cat([x.new_ones(x.shape[0], 3, H), x], 1), is_causal=True)[:, 3:],
    "attention over two copies": lambda x: attend(torch.cat([x, x * 2], 1)),
    "attention of the last token": lambda x: F.scaled_dot_product_attention(
        heads(x)[:, :, -1:], heads(x), heads(x)),
    "several outputs": lambda x: (x + 1, {"mean": x.mean(1), "same": x}),
    "outer product of features": lambda x: x.unsqueeze(-1) @ x.unsqueeze(-2),
    "attention": lambda x: attend(x),
    "causal attention": lambda x: attend(x, is_causal=True),
    "scaled attention": lambda x: attend(x, scale=0.3),
    "attention, causal from positions": lambda x: attend(x, attn_mask=causal(x)),
    "attention, tril": lambda x: attend(
        x, attn_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()),
    "attention, triu of -inf": lambda x: attend(
        x, attn_mask=torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)),
    "attention, window": lambda x: attend(
        x, attn_mask=causal(x) & (index(x)[:, None] - index(x)[None, :] < 5)),
    "attention, both sides of a window": lambda x: attend(
        x, attn_mask=(index(x)[:, None] - index(x)[None, :]).abs() < 4),
    "attention, prefix": lambda x: attend(x, attn_mask=causal(x) | (index(x)[None, :] < 4)),
    "attention, chunks": lambda x: attend(
        x, attn_mask=causal(x) & (index(x)[:, None] // 6 == index(x)[None, :] // 6)),
    "attention, ALiBi": lambda x: attend(
        x, attn_mask=torch.where(causal(x), -0.1 * (index(x)[:, None] - index(x)[None, :]),
                                 float("-inf"))),
    "attention, ALiBi by head": lambda x: attend(
        x, attn_mask=(index(x)[None, :] - index(x)[:, None]) * torch.tensor(
            [0.1, 0.2, 0.4]).view(1, 3, 1, 1)),
    "attention, keys by position": lambda x: attend(
        x, attn_mask=(index(x) % 4 != 1)[None, None, None, :]),
    "attention, mask from data": lambda x: attend(
        x, attn_mask=(x[:, :, 0] > -1.0)[:, None, None, :] & causal(x)),
    "sigmoid attention": lambda x: (heads(x) @ heads(x).transpose(-1, -2)).sigmoid() @ heads(x),
    "attention over pooled keys": lambda x: F.scaled_dot_product_attention(
        heads(x), heads(x.flip(1)), heads(x)).transpose(1, 2).reshape(x.shape),
}


@cache
def module_of(name: str) -> Lambda:
    """One module for both orders, which is captured once."""
    return Lambda(CASES[name])


ORDERS = ("contiguous", "zigzag")


def in_turns(name: str, order: str) -> bool:
    """Two of three cases, half of them in each order; tests of the rules have each op by itself."""
    place = list(CASES).index(name)
    return place % 3 < 2 and order == ORDERS[place // 3 % 2]


@pytest.mark.parametrize(
    ("name", "order"),
    some_fast(
        CASES, ORDERS, fast=in_turns
    ),
)
def test_matches(name: str, order: str) -> None:
    module = module_of(name)
    example, inputs = torch.randn(2, 17, H), torch.randn(2, 23, H)
    parallel = compiled(module, (example,), "ring=3", order=order)
    expected = module(inputs)
    found = run(parallel, (inputs,))
    assert difference(found.outputs, expected) < 1e-6
    for shares in found.shares:  # what is whole is the same on every rank
        assert len(shares) == len(found.shares[0])


@pytest.mark.parametrize("flags", [False, True], ids=["additive", "boolean"])
def test_a_mask_that_the_caller_passes(flags: bool) -> None:
    """[B, 1, S, S] from outside: each rank its own rows, all columns."""

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return attend(x, attn_mask=mask)

    def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.randn(2, 1, length, length)
        return torch.randn(2, length, H), (mask > 0) | torch.eye(length).bool() if flags else mask

    parallel, given = compiled(Masked(), inputs(17), "ring=3"), inputs(23)
    assert difference(run(parallel, given).outputs, Masked()(*given)) < 1e-6


REFUSED: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "an op without a rule": (
        lambda x: torch.linalg.pinv(x),
        "aten.linalg_pinv.atol_rtol_tensor has no sharding rule, and its inputs are split"),
    "dropout": (lambda x: F.dropout(x, 0.1, training=True), "dropout with p=0.1 is left on"),
    "attention dropout": (
        lambda x: attend(x, dropout_p=0.2), "attention dropout with p=0.2 is left on"),
    "branch on data": (
        lambda x: x + 1 if x.sum() > 0 else x - 1,
        "control flow or a size depends on the values of a tensor, not on shapes",
    ),
    "length from data": (
        lambda x: x[:, : int(x.sum().item()) % 3],
        "control flow or a size depends on the values of a tensor, not on shapes",
    ),
    "five-dim attention": (
        lambda x: F.scaled_dot_product_attention(*(heads(x)[None],) * 3),
        "attention over tensors of 5 dims",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(RingCompileError) as caught:
        compiled(Lambda(function), (torch.randn(2, 17, H),), "ring=3")
    assert message in str(caught.value)
    assert caught.value.location is not None
    assert caught.value.location.file == __file__, "the user's own line"
    assert caught.value.location.text
    assert caught.value.hint


def test_gather_unknown_gives_the_same_numbers() -> None:
    module, inputs = Lambda(REFUSED["an op without a rule"][0]), torch.randn(2, 23, H)
    parallel = compiled(module, (torch.randn(2, 17, H),), "ring=3", gather_unknown=True)
    assert parallel.program.notes, "it says what it gathered"
    assert difference(run(parallel, (inputs,)).outputs, module(inputs)) < 1e-6


def test_an_op_that_fails_at_run_time_is_an_error_with_the_users_line() -> None:
    module = Lambda(lambda x: x + F.embedding(index(x), TABLE))
    parallel = compiled(module, (torch.randn(1, 17, H),), "ring=2")
    with pytest.raises(RingCompileError, match="failed: index out") as caught:
        run(parallel, (torch.randn(1, 70, H),))
    assert caught.value.location is not None
    assert caught.value.location.file == __file__
