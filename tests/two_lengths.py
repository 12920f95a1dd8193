"""Small models whose inputs are of several lengths, in plain PyTorch, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, ROWS = 50, 32, 4, 64


class Attention(nn.Module):
    """Attention of x over y, projections included."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(y)), self.heads(self.v(y))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o(out.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """An encoder's layer, or with `cross` a decoder's."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.norm, self.own = nn.LayerNorm(WIDTH), Attention()
        self.norm_cross, self.cross = (nn.LayerNorm(WIDTH), Attention()) if cross else (None, None)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor | None = None,
        mask: torch.Tensor | None = None, seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.own(y, y, mask, causal=mask is None and memory is not None)
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), memory, seen)
        return x + self.mlp(self.norm_mlp(x))


class Translator(nn.Module):
    """An encoder and a decoder; `forward` is the plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(ROWS, WIDTH)
        self.encoder = nn.ModuleList([Layer(False), Layer(False)])
        self.decoder = nn.ModuleList([Layer(True), Layer(True)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return self.ids(ids) + self.places.weight[: ids.shape[1]]

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x, y = self.embedded(source), self.embedded(target)
        for layer in self.encoder:
            x = layer(x)
        for layer in self.decoder:
            y = layer(y, x)
        return self.head(y)


class Masked(Translator):
    """Both sequences padded; the encoder's result is returned too."""

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, source_mask: torch.Tensor,
        target_mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        x, y = self.embedded(source), self.embedded(target)
        seen = source_mask[:, None, None, :].bool()
        place = torch.arange(target.shape[1])
        mask = (place[:, None] >= place)[None, None] & target_mask[:, None, None, :].bool()
        for layer in self.encoder:
            x = layer(x, mask=seen)
        for layer in self.decoder:
            y = layer(y, x, mask, seen)
        return {"logits": self.head(y), "memory": x}


class ByHand(Translator):
    """Cross attention written out, with a bias for each pair."""

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        x, y = self.encoder[0](self.embedded(source)), self.embedded(target)
        cross = self.decoder[0].cross
        q, k, v = (cross.heads(f(z)) for f, z in ((cross.q, y), (cross.k, x), (cross.v, x)))
        weights = torch.softmax(q @ k.transpose(-1, -2) * 0.3 + bias[:, None], -1)
        return self.head(self.decoder[1](cross.o((weights @ v).transpose(1, 2).flatten(2)), x))


class Banded(Translator):
    """A query sees the keys up to its own position, of which there may be fewer, or more."""

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x, y = self.encoder[0](self.embedded(source)), self.embedded(target)
        seen = torch.arange(target.shape[1])[:, None] >= torch.arange(source.shape[1])
        return self.head(self.decoder[0](y, x, seen=seen[None, None]))


class Mixing(Translator):
    """Ops along both sequences: convolutions, sums, means, lengths as numbers, all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, stride=2)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv(self.embedded(source).transpose(1, 2)).transpose(1, 2)
        y = self.embedded(target).cumsum(1) / target.shape[1] + x.mean(1, keepdim=True)
        x = self.encoder[0](x)
        y = self.decoder[0](y, x)
        pairs = torch.relu(y @ x.transpose(1, 2))
        return self.head(pairs @ x / source.shape[1]), pairs.sum(1)


class Chain(Translator):
    """Three lengths: tokens that look at a text, and then at a sound."""

    def __init__(self) -> None:
        super().__init__()
        self.listen = Layer(True)

    def forward(
        self, target: torch.Tensor, text: torch.Tensor, sound: torch.Tensor
    ) -> torch.Tensor:
        text = self.encoder[0](self.embedded(text))
        y = self.decoder[0](self.embedded(target), text)
        return self.listen(y, self.encoder[1](sound))


class Latents(Translator):
    """A few learned tokens look at a sequence, and another one looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        z = self.latents.expand(source.shape[0], -1, -1)
        z = self.encoder[0](z + self.decoder[0].cross(z, self.embedded(source)))
        return self.decoder[1].cross(self.embedded(target), z)


class Joined(Translator):
    """A context in front of the tokens: both are one sequence."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        both = self.encoder[0](torch.cat([context, x], 1))
        return both[:, context.shape[1] :]


class Shorter(Translator):
    """Code that asks which of the two is longer."""

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory = self.encoder[0](self.embedded(source))
        y = self.decoder[0](self.embedded(target), memory)
        return y if target.shape[1] <= source.shape[1] else 2 * y


@dataclass(frozen=True)
class Inputs:
    """Random inputs, the same for the same lengths."""

    source: int
    target: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(100 * self.source + self.target)

    def ids(self, length: int) -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (2, length), generator=self.generator)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=self.generator, dtype=torch.float64)

    def pair(self) -> tuple[torch.Tensor, ...]:
        return self.ids(self.source), self.ids(self.target)

    def masks(self) -> tuple[torch.Tensor, ...]:
        found = []
        for length, hidden in ((self.source, self.source // 3), (self.target, self.target // 4)):
            found.append(torch.ones(2, length, dtype=torch.long))
            found[-1][1, length - hidden :] = 0
        return (*self.pair(), *found)

    def bias(self) -> tuple[torch.Tensor, ...]:
        return (*self.pair(), self.floats(self.target, self.source))

    def three(self) -> tuple[torch.Tensor, ...]:
        return (self.ids(self.target), self.ids(self.source),
                self.floats(self.source + self.target, WIDTH))

    def features(self) -> tuple[torch.Tensor, ...]:
        return self.floats(self.source, WIDTH), self.floats(self.target, WIDTH)


MODELS: dict[str, tuple[type[Translator], Callable[[Inputs], tuple[torch.Tensor, ...]]]] = {
    "plain": (Translator, Inputs.pair), "masked": (Masked, Inputs.masks),
    "by hand": (ByHand, Inputs.bias), "banded": (Banded, Inputs.pair),
    "mixing": (Mixing, Inputs.pair), "three lengths": (Chain, Inputs.three),
    "latents": (Latents, Inputs.pair), "joined": (Joined, Inputs.features),
    "shorter": (Shorter, Inputs.pair),
}


@cache
def model_of(name: str) -> nn.Module:
    """One of these, in float64, with weights for which it matters which keys a query sees."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def inputs_of(name: str, source: int, target: int) -> tuple[torch.Tensor, ...]:
    """Its inputs for these two lengths."""
    return MODELS[name][1](Inputs(source, target))
