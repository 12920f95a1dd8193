"""Weights at a gain: a model that was initialised small hardly shows what attention does.

Whether ranks compute what the model computes does not depend on the values of its weights. So
besides its own, numbers are compared under weights that are made larger: matrices up to a standard
deviation at which what they multiply keeps its size, and vectors moved away from one and zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from zlib import crc32

import torch

from ringcompile.ir.program import WeightSource

_GAIN, _LARGEST, _MOVED = 1.3, 1000.0, 0.2


@dataclass
class Strengthened:
    """A source of weights at a gain, from another one.

    Attributes:
        source: the weights as they are.
        names: those that may be changed; others the compiler may have read as constants.
    """

    source: WeightSource
    names: frozenset[str]
    _factors: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str) -> torch.Tensor:
        """The whole weight, changed the same way every time."""
        weight = self.source(name)
        if name not in self.names or not _has_arithmetic(weight) or not weight.numel():
            return weight
        if weight.dim() > 1:
            if name not in self._factors:
                self._factors[name] = _factor(weight)
            return weight * self._factors[name]
        return _moved(weight, name)


def _has_arithmetic(weight: torch.Tensor) -> bool:
    """Floats, but for those of a byte, which stand for packed weights and have scales beside."""
    return weight.is_floating_point() and weight.dtype.itemsize > 1


def _factor(weight: torch.Tensor) -> float:
    """What a matrix is multiplied by; 1 for tables that are no random numbers around zero."""
    values = weight.float()
    spread, middle = float(values.std()), abs(float(values.mean()))
    if not 0 < spread < float("inf") or middle > spread / 4:
        return 1.0
    return min(max(_GAIN / sqrt(weight.shape[-1]) / spread, 1.0), _LARGEST)


def _moved(weight: torch.Tensor, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32) * _MOVED
    if not weight.any():
        return noise.to(weight.dtype)
    return (weight.float() * (1 + noise.clamp(-0.5, 0.5))).to(weight.dtype)


@dataclass(frozen=True)
class Jolted:
    """A source of weights with the last bits of every one at random: how far outputs move then."""

    source: WeightSource
    seed: int

    def __call__(self, name: str) -> torch.Tensor:
        """The whole weight, a rounding error away."""
        weight = self.source(name)
        if not _has_arithmetic(weight):
            return weight
        generator = torch.Generator().manual_seed(self.seed + crc32(name.encode()))
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        jolt = 1 + noise * 2 * torch.finfo(weight.dtype).eps
        return (weight.double() * jolt).to(weight.dtype)
