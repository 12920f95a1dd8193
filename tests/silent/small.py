"""Small models in float64 whose weights have gain, so that whatever is lost shows in the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.support import compiled, difference, run

CAPTURED, WIDTH, HEADS, VOCABULARY = 24, 32, 4, 48
EXACT = 1e-10  # the largest difference that float64 results may show, of the largest output

Inputs = Callable[[int], tuple[torch.Tensor, ...]]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ids(length: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def with_gain(module: nn.Module) -> nn.Module:
    """The module in float64, with weights that keep values at a size of about one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                scale = 1.6 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2
                parameter.normal_(0, scale)
    return module.double().eval()


class Attention(nn.Module):
    """Self-attention; with fewer key heads than query heads, those are repeated."""

    def __init__(self, groups: int = HEADS, causal: bool = True) -> None:
        super().__init__()
        self.groups, self.causal = groups, causal
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH * groups // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.groups, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k, v = (t.repeat_interleave(HEADS // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Embedding, attention, `between`, head.

    Args:
        between: from the model, the stream and the tokens to what is added to the stream.
        modules: more modules and parameters, by name.
    """

    def __init__(
        self,
        between: Callable[..., torch.Tensor] | None = None,
        groups: int = HEADS,
        **modules: Any,
    ) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(VOCABULARY, WIDTH), Attention(groups)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.between = between
        for name, module in modules.items():
            setattr(self, name, module)
        with_gain(self)

    def forward(self, tokens: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, *more)
        if self.between is not None:
            x = x + self.between(self, x, tokens)
        return self.head(F.layer_norm(x, x.shape[-1:]))


def matches(
    model: nn.Module,
    spec: str,
    inputs: Inputs = lambda n: (ids(n),),
    lengths: Iterable[int] = (27, 5),
    **options: Any,
) -> None:
    """Capture at 24 tokens, run at other lengths on all ranks, and compare with the model."""
    parallel = compiled(model, inputs(CAPTURED), spec, **options)
    for length in lengths:
        given = inputs(length)
        with torch.no_grad():
            expected = model(*given)
        found = run(parallel, given).outputs
        assert difference(found, expected) <= EXACT, f"{spec} at {length}"
