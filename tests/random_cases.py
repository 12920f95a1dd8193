"""What a random model is made of: drawn from a seed, and said in words.

Letters in shapes: B batch, S sequence.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor, nn

from ringcompile.models.config import TransformerConfig
from ringcompile.models.moe import MoE
from tests.moe_table import STYLES

VOCABULARY: Final = 37
MAX_LENGTH: Final = 48


BANDS: Final[dict[str, Callable[[Tensor, Tensor, int], Tensor]]] = {
    "causal": lambda i, j, width: i >= j,
    "window": lambda i, j, width: (i >= j) & (i - j < width),
    "window on both sides": lambda i, j, width: (i - j).abs() < width,
    "chunked": lambda i, j, width: (i >= j) & (i // width == j // width),
    "prefix": lambda i, j, width: (i >= j) | (j < width),
}
SEES_THE_START: Final = ("bidirectional", "causal", "prefix")


def zoo_mixture(**changes: Any) -> Callable[..., nn.Module]:
    """The zoo's own mixture, as a factory like those of the styles."""

    def factory(size: int, num_experts: int, top_k: int) -> nn.Module:
        module = MoE(TransformerConfig(
            vocab_size=1, num_layers=1, hidden_size=size, num_heads=1, num_kv_heads=1, head_dim=2,
            mlp_hidden=2 * size, num_experts=num_experts, top_k=top_k, **changes))
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=size**-0.5)
        return module

    return factory


DROPS: Final = {
    "zoo, slots": zoo_mixture(capacity_factor=Fraction(5, 4)),
    **{name: style.factory for name, style in STYLES.items()
       if style.tokenwise and style.captured and style.any_length and style.order},
}
DROPLESS: Final = {
    "zoo, every expert": zoo_mixture(),
    **{name: style.factory for name, style in STYLES.items()
       if style.tokenwise and style.captured and style.dtype is torch.float32 and not style.order},
}
MIXTURES: Final[dict[str, Callable[..., nn.Module]]] = {**DROPS, **DROPLESS}


@dataclass(frozen=True)
class Case:
    """Everything that a seed decides; the weights and inputs come from it as well."""

    seed: int
    # sizes
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    # the model
    inputs: str  # tokens, hidden states
    positions: str  # none, learned, rotary, rotary in pairs, sinusoidal, ALiBi
    counted: str  # how positions are counted: arange, given, from the padding mask
    norm: str  # rms, layer
    placement: str  # pre, post, sandwich, parallel
    mlp: str  # plain, gated, or a mixture
    experts: int
    top_k: int
    attention: str  # sdpa, matmul, einsum
    grouping: str  # repeat, expand, flag
    fused: bool  # query, key and value from one matrix
    qk_norm: bool
    scale: float | None
    head: str  # logits, last, last kept, first, mean, last real
    extra_output: bool
    # the mask
    band: str
    width: int
    padding: str  # none, right, left
    documents: str  # none, given, counted from separators
    mask_form: str  # flag, boolean, -inf, lowest
    tril: bool
    # the compilation
    ranks: int
    order: str
    capture_length: int
    lengths: tuple[int, ...]
    fixed: bool  # compiled for one length
    gather_unknown: bool

    @property
    def axes(self) -> tuple[str, ...]:
        """What divides the sequence: ranks, one rank in time, or both."""
        return {3: ("time", "ring"), 4: ("time",)}.get(self.seed % 5, ("ring",))

    @property
    def parallel(self) -> str:
        """The parallel spec."""
        if len(self.axes) == 1:
            return f"{self.axes[0]}={self.ranks}"
        return f"time={2 + self.seed // 5 % 3},ring={1 + self.ranks // 2}"

    @property
    def hides_rows(self) -> bool:
        """Whether a padding query may see no key at all: what it gives then is nobody's concern."""
        if self.padding == "none":
            return False
        start = self.padding == "right" and self.band in SEES_THE_START
        return self.documents != "none" or not (start or self.band == "bidirectional")

    def words(self) -> str:
        """All choices on one line."""
        rows = dataclasses.asdict(self)
        return ", ".join(f"{name}={value!r}" for name, value in rows.items())


def case_of(seed: int) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    pick, chance = draw.choice, lambda share: draw.random() < share
    kv_heads, group = pick([1, 2, 2, 3]), pick([1, 1, 2, 3])
    heads, ranks = kv_heads * group, draw.randint(1, 8)
    padding = pick(["none", "none", "none", "right", "right", "left"])
    inputs = pick(["tokens", "tokens", "hidden states"])
    separators = ["counted"] if inputs == "tokens" else []
    positions = pick(
        ["none", "learned", "rotary", "rotary", "rotary in pairs", "sinusoidal", "ALiBi"])
    counts = ["arange", "arange", "given"] + ["from the padding mask"] * (padding != "none")
    sizes = Case(
        seed=seed, layers=pick([1, 1, 1, 2, 3]), hidden=pick([8, 12, 16, 20, 24]), heads=heads,
        kv_heads=kv_heads, head_dim=pick([2, 4, 6, 8, 10]), batch=pick([1, 2, 2, 3]),
        inputs=inputs, positions=positions,
        counted="arange" if positions in ("none", "ALiBi") else pick(counts),
        norm=pick(["rms", "layer"]), placement=pick(["pre", "pre", "post", "sandwich", "parallel"]),
        mlp="plain", experts=pick([4, 4, 4, 8]), top_k=pick([1, 2, 2]),
        attention=pick(["sdpa", "sdpa", "sdpa", "matmul", "einsum"]),
        grouping="repeat", fused=chance(0.3), qk_norm=chance(0.2), scale=pick([None, None, 0.3]),
        head="logits", extra_output=chance(0.15),
        band=pick(["bidirectional", "causal", "causal", *BANDS]), width=draw.randint(2, 12),
        padding=padding, documents=pick(["none"] * 5 + ["given"] + separators),
        mask_form="boolean", tril=chance(0.3),
        ranks=ranks, order=pick(["contiguous", "zigzag", "auto"]),
        capture_length=draw.randint(5, 20), lengths=(), fixed=chance(0.1),
        gather_unknown=chance(0.2),
    )
    return _dependent(sizes, draw)


def _dependent(case: Case, draw: random.Random) -> Case:
    """The choices that others limit."""
    mixtures = [*DROPLESS, *(() if case.hides_rows else DROPS)]
    heads = ["logits"] * 4 + ["mean"] + ["last real"] * (case.padding == "right")
    heads += [] if case.hides_rows else ["last", "last kept"]
    sees_ahead = case.band in ("bidirectional", "prefix", "window on both sides")
    heads += ["first"] if sees_ahead and not case.hides_rows else []
    plain_causal = (case.band == "causal" and case.padding == case.documents == "none"
                    and case.positions != "ALiBi" and case.attention == "sdpa")
    forms = ["boolean", "lowest"] + ["-inf"] * (not case.hides_rows) + ["flag"] * plain_causal * 4
    low = max(1, case.ranks - 2)
    clash = case.inputs == "hidden states" and case.capture_length == case.hidden
    lengths = [draw.randint(1, low), 2 * case.ranks * draw.randint(1, 2), draw.randint(9, 40)]
    return dataclasses.replace(
        case,
        mlp=draw.choice(["plain", "gated", draw.choice(mixtures)]),
        grouping=draw.choice(["repeat", "expand"] + ["flag"] * (case.attention == "sdpa")),
        head=draw.choice(heads),
        mask_form=draw.choice(forms),
        capture_length=case.capture_length + clash,
        lengths=tuple(lengths[2:] if case.fixed else lengths),
    )
