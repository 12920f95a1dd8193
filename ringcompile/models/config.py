"""The config of the reference transformer, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

_DTYPES: Final = ("float64", "float32", "bfloat16", "float16")
_CHOICES: Final = {
    "positions": ("rotary", "learned"),
    "norm": ("rms", "layer"),
    "mlp": ("gated", "plain"),
    "inputs": ("tokens", "hidden"),
    "dtype": _DTYPES,
}
_COUNTS: Final = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_hidden",
    "max_positions",
    "top_k",
)
_FLAGS: Final = ("causal", "tie_embeddings", "bias")
_REALS: Final = ("rope_theta", "norm_eps")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of one transformer.

    Attributes:
        vocab_size: Rows of the token embedding; 0 with ``inputs='hidden'``.
        num_layers: Number of pre-norm blocks.
        hidden_size: Width E of the residual stream; need not be ``num_heads * head_dim``.
        num_heads: Query heads H.
        num_kv_heads: Key/value heads K; divides ``num_heads``.
        head_dim: Width D of one head; even with rotary positions.
        mlp_hidden: Width of the MLP's inner activation.
        causal: True for a decoder, False for an encoder.
        positions: ``'rotary'`` on queries and keys, or a ``'learned'`` table added to the input.
        norm: ``'rms'`` or ``'layer'``.
        mlp: ``'gated'`` (SiLU, three matrices) or ``'plain'`` (GELU, two matrices).
        num_experts: Experts E in place of each MLP, each one such an MLP; 0 for none.
        top_k: Experts a token goes through.
        capacity_factor: An expert takes ``ceil(capacity_factor * tokens * top_k / num_experts)``
            tokens and leaves the others out; None for all that choose it.
        inputs: ``'tokens'``, or ``'hidden'``: hidden states in and out, no embedding and no head.
        max_positions: Longest sequence meant; the rows of a learned table.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of every norm.
        tie_embeddings: The head shares the token embedding's weight.
        bias: Biases in linear layers and LayerNorms; the head and RMSNorm never have one.
        dtype: Name of the parameters' dtype.

    Raises:
        ValueError: A field has a value that does not fit; the message names it.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_hidden: int
    causal: bool = True
    positions: str = "rotary"
    norm: str = "rms"
    mlp: str = "gated"
    num_experts: int = 0
    top_k: int = 2
    capacity_factor: Fraction | None = None
    inputs: str = "tokens"
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    bias: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check each field alone, then the fields that depend on one another."""
        for field in _COUNTS:
            self._require(field, _is_count(getattr(self, field)), "must be a positive integer")
        for field in _REALS:
            self._require(field, _is_positive(getattr(self, field)), "must be a positive number")
        for field in _FLAGS:
            self._require(field, isinstance(getattr(self, field), bool), "must be True or False")
        for field, choices in _CHOICES.items():
            known = ", ".join(map(repr, choices))
            self._require(field, getattr(self, field) in choices, f"must be one of {known}")
        self._check_together()

    def _check_together(self) -> None:
        self._require(
            "num_kv_heads",
            self.num_heads % self.num_kv_heads == 0,
            f"must divide num_heads, which is {self.num_heads}",
        )
        even = self.positions != "rotary" or self.head_dim % 2 == 0
        self._require("head_dim", even, "must be even with positions='rotary'")
        if self.inputs == "tokens":
            fits, rule = _is_count(self.vocab_size), "must be a positive integer"
        else:
            fits, rule = self.vocab_size == 0, "must be 0"
        self._require("vocab_size", fits, f"{rule} with inputs={self.inputs!r}")
        self._check_experts()
        self._require(
            "tie_embeddings",
            not self.tie_embeddings or self.has_head,
            "needs a head: inputs='tokens' and causal=True, "
            f"here inputs={self.inputs!r} and causal={self.causal}",
        )

    def _check_experts(self) -> None:
        count, factor = self.num_experts, self.capacity_factor
        counted = count == 0 or _is_count(count)
        self._require("num_experts", counted, "must be 0 or a positive integer")
        if count == 0:
            rule = "must be None without experts (num_experts is 0)"
            self._require("capacity_factor", factor is None, rule)
            return
        rule = f"must be at most num_experts, which is {count}"
        self._require("top_k", self.top_k <= count, rule)
        self._require("bias", not self.bias, "must be False with experts, which have none")
        exact = factor is None or (isinstance(factor, Fraction) and factor > 0)
        self._require("capacity_factor", exact, "must be None or a positive Fraction")

    def _require(self, field: str, fits: bool, rule: str) -> None:
        if not fits:
            raise ValueError(f"TransformerConfig.{field} is {getattr(self, field)!r}: {rule}")

    @property
    def has_head(self) -> bool:
        """Whether the model ends in logits: a decoder over tokens."""
        return self.inputs == "tokens" and self.causal


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
