"""Mamba 2's function of states against that of transformers, which goes in fixed chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2Model
from transformers.models.mamba2 import modeling_mamba2

from ringcompile.capture.huggingface_states import states_by_scan

BATCH, HEADS, SIZE, STATES, GROUPS = 2, 4, 6, 5, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "as in layers": {"D": torch.linspace(-1, 1, HEADS), "dt_bias": torch.linspace(0, 1, HEADS),
                     "dt_softplus": True, "z": None, "return_final_states": False},
    "bounded steps": {"dt_bias": torch.linspace(0, 2, HEADS), "dt_limit": (0.5, 1.5)},
    "steps alone": {},
    "a state to begin from": {"initial_states": torch.ones(BATCH, HEADS, SIZE, STATES)},
    "a state to return": {"return_final_states": True},
}


def ours() -> Callable[..., Any]:
    config = Mamba2Config(
        hidden_size=8, num_heads=4, head_dim=4, state_size=4, n_groups=1, num_hidden_layers=1,
        vocab_size=8,
    )
    before = modeling_mamba2.mamba2_chunk_scan
    with states_by_scan(Mamba2Model(config)):
        found = modeling_mamba2.mamba2_chunk_scan
    assert modeling_mamba2.mamba2_chunk_scan is before
    assert found is not before
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_it_computes_what_transformers_does(name: str) -> None:
    torch.manual_seed(0)
    for length in (1, 7, 8, 19, 70):
        x = torch.randn(BATCH, length, HEADS, SIZE)
        dt, rates = torch.rand(BATCH, length, HEADS), -torch.rand(HEADS) * 4
        entering, read = (torch.randn(BATCH, length, GROUPS, STATES) for _ in range(2))
        arguments, options = (x, dt, rates, entering, read), {"chunk_size": 8, **OPTIONS[name]}
        expected = modeling_mamba2.mamba2_chunk_scan(*arguments, **options)
        torch.testing.assert_close(ours()(*arguments, **options), expected, rtol=1e-5, atol=1e-5)
