"""The zoo's models in float64, a block at a time, so that only one block's weights are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.weights import DrawnWeights
from ringcompile.models.transformer import Block, Rotary, _norm

_ROWS = 1024  # queries whose scores are in memory at a time


@torch.no_grad()
def forward(weights: DrawnWeights, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [1, S, E] through the whole model, in float64.

    Args:
        weights: of a model over hidden states.
        hidden: the inputs, in any dtype.
    """
    config = dataclasses.replace(weights.config, dtype="float64")
    device = hidden.device
    x = hidden.double()
    rotary = Rotary(config.head_dim, config.rope_theta).to(device)
    angles = rotary(torch.arange(x.shape[1], device=device), torch.float64)
    with _attention_by_rows():
        for layer in range(config.num_layers):
            x = _filled(lambda: Block(config), weights, f"blocks.{layer}.")(x, angles, None)
    return _filled(lambda: _norm(config), weights, "norm.")(x)


def _filled(
    make: Callable[[], torch.nn.Module], weights: DrawnWeights, prefix: str
) -> torch.nn.Module:
    with torch.device("meta"):
        module = make()
    for name, parameter in list(module.named_parameters()):
        owner: Any = module
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        value = weights(prefix + name).to(parameter.dtype)
        setattr(owner, last, torch.nn.Parameter(value, requires_grad=False))
    return module


@contextmanager
def _attention_by_rows() -> Iterator[None]:
    """Causal attention of torch in float64 holds all scores at once: 34 GB at 16,384 tokens."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _causal  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> torch.Tensor:
    assert options["is_causal"]
    assert options["attn_mask"] is None
    out = torch.empty_like(q)
    keys = torch.arange(k.shape[2], device=k.device)
    for start in range(0, q.shape[2], _ROWS):
        end = min(start + _ROWS, q.shape[2])
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        scores *= q.shape[3] ** -0.5
        scores.masked_fill_(keys[:end] > keys[start:end, None], -torch.inf)
        out[:, :, start:end] = scores.softmax(-1) @ v[:, :, :end]
    return out
