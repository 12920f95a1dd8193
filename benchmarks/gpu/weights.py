"""Weights of the zoo's large models, drawn on the GPU: their sizes and scales, other numbers.

The zoo draws on the CPU, the same on every machine, which takes minutes for 18 billion numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch

from ringcompile.capture.loaders import load_model
from ringcompile.models import zoo
from ringcompile.models.transformer import Rotary


@dataclass
class DrawnWeights:
    """A source of weights; see `ringcompile.ir.program.WeightSource`.

    Args:
        model: the zoo's name.
        device: where they are drawn.
        cached: keep what was drawn.
    """

    model: str
    device: torch.device
    cached: bool = True
    _shapes: dict[str, torch.Size] = field(default_factory=dict)
    _drawn: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = zoo.entry(self.model).config
        module = load_model(self.model, weights=False).module  # draws nothing
        self._shapes = {name: x.shape for name, x in module.named_parameters()}

    def __call__(self, name: str) -> torch.Tensor:
        """The weight or buffer of that name, always the same."""
        if name in self._drawn:
            return self._drawn[name]
        if name not in self._shapes:
            made = dict(Rotary(self.config.head_dim, self.config.rope_theta).named_buffers())
            tensor = made[name.rpartition(".")[2]].to(self.device)
        else:
            tensor = self._draw(name)
        if self.cached:
            self._drawn[name] = tensor
        return tensor

    def share(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A part of a weight, which keeps no other part in memory."""
        return self(name)[slices].clone()

    def _draw(self, name: str) -> torch.Tensor:
        """As `Transformer.reset_parameters` scales it."""
        shape = self._shapes[name]
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(shape, device=self.device, dtype=getattr(torch, self.config.dtype))
        if len(shape) == 1:
            return drawn.normal_(0.0 if name.endswith("bias") else 1.0, 0.1, generator=generator)
        last = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
        deep = (2 * self.config.num_layers) ** -0.5 if last else 1.0
        return drawn.normal_(0.0, shape[1] ** -0.5 * deep, generator=generator)
