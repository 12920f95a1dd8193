"""TransformerConfig: what it refuses, in which words."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ringcompile.models.transformer import TransformerConfig

VALID = TransformerConfig(
    vocab_size=100,
    num_layers=2,
    hidden_size=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    mlp_hidden=128,
)

REFUSALS = [
    ({"num_layers": 0}, "num_layers is 0: must be a positive integer"),
    ({"hidden_size": -64}, "hidden_size is -64: must be a positive integer"),
    ({"num_heads": 2.0}, "num_heads is 2.0: must be a positive integer"),
    ({"num_kv_heads": True}, "num_kv_heads is True: must be a positive integer"),
    ({"head_dim": "16"}, "head_dim is '16': must be a positive integer"),
    ({"mlp_hidden": 0}, "mlp_hidden is 0: must be a positive integer"),
    ({"max_positions": 0}, "max_positions is 0: must be a positive integer"),
    ({"rope_theta": 0.0}, "rope_theta is 0.0: must be a positive number"),
    ({"norm_eps": -1e-5}, "norm_eps is -1e-05: must be a positive number"),
    ({"norm_eps": "small"}, "norm_eps is 'small': must be a positive number"),
    ({"causal": 1}, "causal is 1: must be True or False"),
    ({"bias": None}, "bias is None: must be True or False"),
    ({"positions": "alibi"}, "positions is 'alibi': must be one of 'rotary', 'learned'"),
    ({"norm": "batch"}, "norm is 'batch': must be one of 'rms', 'layer'"),
    ({"mlp": "moe"}, "mlp is 'moe': must be one of 'gated', 'plain'"),
    ({"inputs": "pixels"}, "inputs is 'pixels': must be one of 'tokens', 'hidden'"),
    (
        {"dtype": "int8"},
        "dtype is 'int8': must be one of 'float64', 'float32', 'bfloat16', 'float16'",
    ),
    ({"num_kv_heads": 4}, "num_kv_heads is 4: must divide num_heads, which is 6"),
    ({"head_dim": 15}, "head_dim is 15: must be even with positions='rotary'"),
    ({"vocab_size": 0}, "vocab_size is 0: must be a positive integer with inputs='tokens'"),
    ({"inputs": "hidden"}, "vocab_size is 100: must be 0 with inputs='hidden'"),
    (
        {"tie_embeddings": True, "causal": False},
        (
            "tie_embeddings is True: needs a head: inputs='tokens' and causal=True, "
            "here inputs='tokens' and causal=False"
        ),
    ),
    (
        {"tie_embeddings": True, "inputs": "hidden", "vocab_size": 0},
        (
            "tie_embeddings is True: needs a head: inputs='tokens' and causal=True, "
            "here inputs='hidden' and causal=True"
        ),
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=[text for _, text in REFUSALS])
def test_refusal_names_the_field_and_its_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="TransformerConfig") as caught:
        dataclasses.replace(VALID, **changes)
    assert str(caught.value) == f"TransformerConfig.{message}"


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 15, "positions": "learned"},
        {"num_kv_heads": 6},
        {"num_kv_heads": 1},
        {"inputs": "hidden", "vocab_size": 0},
        {"rope_theta": 10000},
        {"causal": False},
    ],
    ids=str,
)
def test_accepted(changes: dict[str, object]) -> None:
    dataclasses.replace(VALID, **changes)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VALID.num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_is_the_name_of_one_of_torchs(name: str) -> None:
    assert isinstance(getattr(torch, dataclasses.replace(VALID, dtype=name).dtype), torch.dtype)
