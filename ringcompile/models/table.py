"""Named reference models: the paper's workloads, small versions of them, and token models.

`dense-4l` is the paper's dense model: 4 layers of 16 heads x 512 (hidden 8192) and a plain MLP of
32768, FP16. The paper names no vocabulary, so it takes hidden states and returns hidden states:
its linear weights are exactly the paper's 4 * (4 * 8192^2 + 2 * 8192 * 32768) * 2 bytes = 6.44 GB,
and nothing but the norms (147 kB) comes on top. The paper names no positions either; rotary ones
add no weights.

`moe-4l` is the paper's mixture of experts: the same, but each MLP is 8 experts of that size, of
which a token goes through 2, with capacity factor 1.25. Its matrices are
4 * (4 * 8192^2 + 8 * 2 * 8192 * 32768) * 2 bytes = 36.51 GB, its routers 4 * 8 * 8192 * 2 = 0.5 MB.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from ringcompile.models.config import TransformerConfig


@dataclass(frozen=True)
class ZooModel:
    """One row of the zoo: what it is, its sizes, and the sequence length of its example inputs."""

    description: str
    config: TransformerConfig
    default_sequence: int


_DENSE_4L: Final = TransformerConfig(
    vocab_size=0,
    num_layers=4,
    hidden_size=8192,
    num_heads=16,
    num_kv_heads=16,
    head_dim=512,
    mlp_hidden=32768,
    mlp="plain",
    inputs="hidden",
    max_positions=1 << 20,
    dtype="float16",
)
_MOE_4L: Final = dataclasses.replace(
    _DENSE_4L, num_experts=8, top_k=2, capacity_factor=Fraction(5, 4)
)
_SMALL_TOKENS: Final = TransformerConfig(
    vocab_size=512,
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    mlp_hidden=256,
    max_positions=512,
)

_SMALL: Final[dict[str, Any]] = {
    "hidden_size": 256,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 32,
    "mlp_hidden": 1024,
    "dtype": "float32",
}
_TINY: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "mlp_hidden": 256,
    "dtype": "float32",
}

ENTRIES: Final = {
    "dense-4l": ZooModel(
        "the paper's dense model: hidden states in and out, MHA 16 x 512, MLP 32768, float16",
        _DENSE_4L,
        default_sequence=16384,
    ),
    "dense-4l-small": ZooModel(
        "dense-4l with 8 heads x 32, hidden 256, MLP 1024, float32",
        dataclasses.replace(_DENSE_4L, **_SMALL),
        default_sequence=192,
    ),
    "dense-4l-tiny": ZooModel(
        "dense-4l with 4 heads x 16, hidden 64, MLP 256, float32",
        dataclasses.replace(_DENSE_4L, **_TINY),
        default_sequence=48,
    ),
    "moe-4l": ZooModel(
        "the paper's mixture of experts: dense-4l with 8 experts, top 2, capacity factor 1.25",
        _MOE_4L,
        default_sequence=16384,
    ),
    "moe-4l-small": ZooModel(
        "moe-4l with 8 heads x 32, hidden 256, experts of 1024, float32",
        dataclasses.replace(_MOE_4L, **_SMALL),
        default_sequence=192,
    ),
    "moe-4l-tiny": ZooModel(
        "moe-4l with 4 heads x 16, hidden 64, experts of 256, float32",
        dataclasses.replace(_MOE_4L, **_TINY),
        default_sequence=48,
    ),
    "gpt-tiny": ZooModel(
        "GPT-2 type decoder: learned positions, LayerNorm, GELU MLP, biases, tied head",
        dataclasses.replace(
            _SMALL_TOKENS,
            positions="learned",
            norm="layer",
            mlp="plain",
            bias=True,
            tie_embeddings=True,
        ),
        default_sequence=64,
    ),
    "llama-tiny": ZooModel(
        "Llama type decoder: rotary, RMSNorm, gated SiLU MLP, grouped-query 6 heads / 2 KV heads",
        dataclasses.replace(
            _SMALL_TOKENS, hidden_size=96, num_heads=6, num_kv_heads=2, max_positions=1 << 16
        ),
        default_sequence=64,
    ),
    "mixtral-tiny": ZooModel(
        "Mixtral type decoder: as llama-tiny, with 4 gated experts for 2 choices, none dropped",
        dataclasses.replace(
            _SMALL_TOKENS,
            hidden_size=96,
            num_heads=6,
            num_kv_heads=2,
            mlp_hidden=128,
            num_experts=4,
            max_positions=1 << 16,
        ),
        default_sequence=64,
    ),
    "bert-tiny": ZooModel(
        "BERT type encoder: learned positions, LayerNorm, GELU MLP, biases, key padding mask",
        dataclasses.replace(
            _SMALL_TOKENS, causal=False, positions="learned", norm="layer", mlp="plain", bias=True
        ),
        default_sequence=48,
    ),
}


def names() -> list[str]:
    """Every zoo name, in the table's order."""
    return list(ENTRIES)


def entry(name: str) -> ZooModel:
    """The row of ``name``.

    Raises:
        KeyError: No such name; the message lists those there are.
    """
    if name not in ENTRIES:
        raise KeyError(f"no model {name!r} in the zoo; there are {', '.join(ENTRIES)}")
    return ENTRIES[name]


def describe(name: str) -> str:
    """One line on ``name``. Raises KeyError as ``entry`` does."""
    return entry(name).description
