"""Build the named reference models of the table, with example inputs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ringcompile.models.config import TransformerConfig
from ringcompile.models.table import ENTRIES, ZooModel, describe, entry, names
from ringcompile.models.transformer import Transformer

__all__ = ["ENTRIES", "ZooModel", "build", "describe", "entry", "names"]


def build(
    name: str,
    *,
    batch: int = 1,
    sequence: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build a model and example inputs, under whatever mode and default device are active.

    Under FakeTensorMode nothing is allocated. Weights and inputs depend on ``seed`` alone: other
    devices hold the same values, other dtypes the same values rounded.

    Args:
        name: A zoo name.
        batch: Rows of the example inputs.
        sequence: Their length; the entry's own by default.
        dtype: Name of the parameters' dtype instead of the config's, such as ``'float64'``.
        seed: Seed of weights and inputs.

    Returns:
        The module in eval mode, and its positional inputs: token ids [B, S] int64 or hidden states
        [B, S, E], and for an encoder the padding mask [B, S] int64.

    Raises:
        KeyError: No such name.
        ValueError: ``batch``, ``sequence`` or ``dtype`` does not fit.
    """
    row = entry(name)
    config = row.config if dtype is None else dataclasses.replace(row.config, dtype=dtype)
    sequence = row.default_sequence if sequence is None else sequence
    if batch < 1:
        raise ValueError(f"batch is {batch}: must be positive")
    if not 1 <= sequence <= config.max_positions:
        raise ValueError(
            f"sequence is {sequence}: {name!r} takes 1 to {config.max_positions} (max_positions)"
        )
    model = Transformer(config, seed=seed).eval()
    return model, _example_inputs(config, batch, sequence, seed)


def _example_inputs(
    config: TransformerConfig, batch: int, sequence: int, seed: int
) -> tuple[Tensor, ...]:
    device = torch.get_default_device()
    generator = torch.Generator().manual_seed(seed + 1)  # the weights' first draws used `seed`
    shape = (batch, sequence)
    if config.inputs == "hidden":
        hidden = torch.randn((*shape, config.hidden_size), generator=generator, device="cpu")
        inputs = hidden.to(device, getattr(torch, config.dtype))
    else:
        tokens = torch.randint(config.vocab_size, shape, generator=generator, device="cpu")
        inputs = tokens.to(device)
    if config.causal:
        return (inputs,)
    return inputs, _padding_mask(batch, sequence)


def _padding_mask(batch: int, sequence: int) -> Tensor:
    """[B, S] int64: row i ends in about i + 1 eighths of padding, and always keeps a token."""
    lengths = [max(1, sequence - max(1, (row + 1) * sequence // 8)) for row in range(batch)]
    mask = torch.arange(sequence)[None, :] < torch.tensor(lengths)[:, None]
    return mask.to(torch.int64)
