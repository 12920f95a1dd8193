"""Random whole models in plain PyTorch, each from a seed, and what becomes of them.

`python -m tests.random_models SEED...` (or `FIRST-LAST`) prints each case in words and its outcome;
`--wrong FILE` also appends every wrong or crashed one to a file at once.

Letters in shapes: B batch, S sequence, H heads, K KV heads, D head_dim, E hidden size.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.models.config import TransformerConfig
from ringcompile.models.moe import MoE
from ringcompile.parallel_program import ParallelProgram
from tests.moe_styles import STYLES
from tests.support import difference, run

TOLERANCE: Final = 1e-9  # in float64, of the largest output
VOCABULARY: Final = 37
MAX_LENGTH: Final = 48

# -- what a case is made of ----------------------------------------------------------------------

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


# -- the model -----------------------------------------------------------------------------------


def rotate(x: Tensor, angles: Tensor, pairs: bool) -> Tensor:
    """Rotary positions, by halves or by neighbours; x [B, H, S, D], angles [S or B, S, D / 2]."""
    angles = angles.unsqueeze(-3)
    cos, sin = angles.cos(), angles.sin()
    if pairs:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        widths = [case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2]
        self.widths = widths
        if case.fused:
            self.qkv = nn.Linear(case.hidden, sum(widths))
        else:
            self.query, self.key, self.value = (nn.Linear(case.hidden, w) for w in widths)
        if case.qk_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(case.head_dim) for _ in range(2))
        self.out = nn.Linear(widths[0], case.hidden, bias=False)

    def forward(self, x: Tensor, angles: Tensor | None, mask: Tensor | None) -> Tensor:
        case = self.case
        if case.fused:
            projected = self.qkv(x).split(self.widths, dim=-1)
        else:
            projected = (self.query(x), self.key(x), self.value(x))
        query, key, value = (
            y.view(*x.shape[:2], -1, case.head_dim).transpose(1, 2) for y in projected)
        if case.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            pairs = case.positions == "rotary in pairs"
            query, key = rotate(query, angles, pairs), rotate(key, angles, pairs)
        key, value = self.grouped(key), self.grouped(value)
        out = self.attend(query, key, value, mask)
        return self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1))

    def grouped(self, x: Tensor) -> Tensor:
        """KV heads for all query heads, unless attention does it."""
        groups = self.case.heads // self.case.kv_heads
        if self.case.grouping == "flag" or groups == 1:
            return x
        if self.case.grouping == "repeat":
            return x.repeat_interleave(groups, dim=1)
        batch, heads, length, size = x.shape
        expanded = x[:, :, None].expand(batch, heads, groups, length, size)
        return expanded.reshape(batch, heads * groups, length, size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        case = self.case
        if case.attention == "sdpa":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=case.mask_form == "flag",
                scale=case.scale, enable_gqa=case.grouping == "flag")
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        if case.attention == "matmul":
            scores = torch.matmul(query, key.transpose(-2, -1)) * scale
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", query * scale, key)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(dim=-1)
        if case.attention == "matmul":
            return weights @ value
        return torch.einsum("bhqk,bhkd->bhqd", weights, value)


class Plain(nn.Module):
    def __init__(self, size: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(size, 2 * size) if gated else None
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.placement = case.placement
        norm = nn.RMSNorm if case.norm == "rms" else nn.LayerNorm
        self.norms = nn.ModuleList(norm(case.hidden) for _ in range(4))
        self.attention = Attention(case)
        if case.mlp in MIXTURES:
            self.mlp = MIXTURES[case.mlp](case.hidden, case.experts, case.top_k)
        else:
            self.mlp = Plain(case.hidden, case.mlp == "gated")

    def forward(self, x: Tensor, *where: Tensor | None) -> Tensor:
        first, second, third, fourth = self.norms
        if self.placement == "parallel":
            return x + self.attention(first(x), *where) + self.mlp(first(x))
        if self.placement == "post":
            x = first(x + self.attention(x, *where))
            return second(x + self.mlp(x))
        if self.placement == "pre":
            x = x + self.attention(first(x), *where)
            return x + self.mlp(second(x))
        x = x + third(self.attention(first(x), *where))
        return x + fourth(self.mlp(second(x)))


class RandomModel(nn.Module):
    """The model of a case, in float64."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            if case.inputs == "tokens":
                self.embedding = nn.Embedding(VOCABULARY, case.hidden)
            if case.positions == "learned":
                self.table = nn.Embedding(MAX_LENGTH, case.hidden)
            if case.positions == "ALiBi":
                self.register_buffer("slopes", torch.rand(case.heads) * 0.5 + 0.05)
            width = case.hidden if case.positions == "sinusoidal" else case.head_dim
            exponent = torch.arange(0, width, 2) / width
            self.register_buffer("frequencies", 30.0**-exponent)
            self.blocks = nn.ModuleList(Block(case) for _ in range(case.layers))
            self.norm = nn.LayerNorm(case.hidden)
            self.head = nn.Linear(case.hidden, VOCABULARY, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1 or "router" in name:
                    nn.init.normal_(parameter, mean=float("norm" in name), std=0.4)
        self.double().eval()

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Any:
        case = self.case
        x = self.embedding(inputs) if case.inputs == "tokens" else inputs
        position_ids = self.counted(x, attention_mask, position_ids)
        angles = position_ids[..., None] * self.frequencies
        if case.positions == "learned":
            x = x + self.table(position_ids)
        elif case.positions == "sinusoidal":
            x = x + torch.cat((angles.sin(), angles.cos()), dim=-1)
        if case.documents == "counted":
            documents = (inputs == 0).cumsum(dim=1)
        mask = self.mask(x, attention_mask, documents)
        rotary = angles if case.positions.startswith("rotary") else None
        for block in self.blocks:
            x = block(x, rotary, mask)
        out = self.headed(self.norm(x), attention_mask)
        return {"out": out, "hidden": x} if case.extra_output else out

    def counted(self, x: Tensor, mask: Tensor | None, given: Tensor | None) -> Tensor:
        """Positions [S] or [B, S]."""
        if self.case.counted == "given":
            assert given is not None
            return given
        if self.case.counted == "from the padding mask":
            assert mask is not None
            return (mask.cumsum(dim=-1) - 1).clamp(min=0)
        return torch.arange(x.shape[1], device=x.device)

    def mask(self, x: Tensor, padding: Tensor | None, documents: Tensor | None) -> Tensor | None:
        """What attention takes as its mask, [1 or B, 1 or H, S, S]."""
        case, length = self.case, x.shape[1]
        index = torch.arange(length, device=x.device)
        i, j = index[:, None], index[None, :]
        allowed = None
        if case.band == "causal" and case.tril:
            allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        elif case.band != "bidirectional":
            allowed = BANDS[case.band](i, j, case.width)
        parts = [allowed[None, None]] if allowed is not None else []
        if padding is not None:
            parts.append(padding.bool()[:, None, None, :])
        if documents is not None:
            parts.append((documents[:, :, None] == documents[:, None, :]).unsqueeze(1))
        if case.mask_form == "flag" or (not parts and case.positions != "ALiBi"):
            return None
        bias = x.new_zeros(())
        if case.positions == "ALiBi":
            bias = -self.slopes[:, None, None] * (i - j).abs()
        return self.formed(parts, bias)

    def formed(self, parts: list[Tensor], bias: Tensor) -> Tensor:
        """All parts of the mask in one tensor, boolean or additive."""
        if not parts:
            return bias
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        if self.case.mask_form == "boolean" and bias.ndim == 0:
            return allowed
        lowest = float("-inf") if self.case.mask_form == "-inf" else torch.finfo(bias.dtype).min
        return torch.where(allowed, bias, lowest)

    def headed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.case.head == "last real":
            assert mask is not None
            x = x[torch.arange(x.shape[0], device=x.device), mask.sum(dim=1) - 1]
        elif self.case.head == "mean" and mask is not None:
            real = mask.unsqueeze(-1).to(x.dtype)
            x = (x * real).sum(dim=1) / real.sum(dim=1)
        else:
            x = POOLED[self.case.head](x)
        return self.head(x)


POOLED: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "logits": lambda x: x,
    "last": lambda x: x[:, -1],
    "last kept": lambda x: x[:, -1:, :],
    "first": lambda x: x[:, 0],
    "mean": lambda x: x.mean(dim=1),
}


def inputs_of(case: Case, length: int) -> dict[str, Tensor]:
    """Inputs of a length, by name."""
    generator = torch.Generator().manual_seed(1000 * case.seed + length)
    shape = (case.batch, length)
    if case.inputs == "tokens":
        found = {"inputs": torch.randint(VOCABULARY // 4, shape, generator=generator)}
    else:
        found = {"inputs": torch.randn(
            (*shape, case.hidden), generator=generator, dtype=torch.float64)}
    if case.padding != "none":
        kept = torch.randint(1, length + 1, (case.batch, 1), generator=generator)
        mask = (torch.arange(length) < kept).long()
        found["attention_mask"] = mask if case.padding == "right" else mask.flip(1)
    if case.counted == "given":
        found["position_ids"] = torch.randint(MAX_LENGTH, shape, generator=generator)
    if case.documents == "given":
        found["documents"] = torch.randint(3, shape, generator=generator).sort(dim=1).values
    return found


# -- what becomes of it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """`kind` is matched, refused, wrong or crashed."""

    kind: str
    detail: str


def trial(case: Case) -> Outcome:
    """Compile a case, run it at its lengths, and hold it against the model itself."""
    model = RandomModel(case)
    for length in case.lengths:
        _checked(model, inputs_of(case, length))
    try:
        parallel = compiled(model)
    except RingCompileError as error:
        return Outcome("refused", _first_lines(error))
    except Exception as error:
        return Outcome("crashed", f"while compiling: {_trace(error)}")
    worst = 0.0
    for length in lengths_of(parallel, case):
        try:
            error = distance(model, parallel, inputs_of(case, length))
        except Exception as failure:
            return Outcome("crashed", f"at length {length}: {_trace(failure)}")
        if not error <= TOLERANCE:
            return Outcome("wrong", f"at length {length}: off by {error:.3g} of the largest output")
        worst = max(worst, error)
    return Outcome("matched", f"within {worst:.1e}")


def lengths_of(parallel: ParallelProgram, case: Case) -> tuple[int, ...]:
    """The case's lengths that the program takes; the captured one if the model's code fixes it."""
    size = parallel.program.inputs[0].type.shape[1]
    if isinstance(size, int):
        return (size,)
    taken = tuple(n for n in case.lengths if n >= parallel.program.length_range[0])
    assert taken, "none of the lengths is tried"
    return taken


def compiled(model: RandomModel) -> ParallelProgram:
    """The parallel program of all ranks."""
    case = model.case
    example = inputs_of(case, case.capture_length)
    first = example.pop("inputs")
    parallel = transform(
        capture(model, (first,), example), case.parallel,
        order=case.order if "ring" in case.axes else "contiguous",
        length=case.lengths[0] if case.fixed else None, gather_unknown=case.gather_unknown)
    parallel.ranks()
    return parallel


@torch.no_grad()
def distance(model: RandomModel, parallel: ParallelProgram, inputs: dict[str, Tensor]) -> float:
    """The largest difference over the largest output; of real tokens where others see nothing."""
    found, expected = run(parallel, inputs).outputs, model(**inputs)
    if model.case.hides_rows:
        real = inputs["attention_mask"].bool()
        found, expected = (
            {name: value[real] if value.shape[:2] == real.shape else value
             for name, value in _named(outputs).items()}
            for outputs in (found, expected))
    return difference(found, expected)


def _named(outputs: Any) -> dict[str, Tensor]:
    return {"out": outputs} if torch.is_tensor(outputs) else dict(outputs)


@torch.no_grad()
def _checked(model: RandomModel, inputs: dict[str, Tensor]) -> None:
    outputs = _named(model(**inputs)).values()
    assert all(bool(x.isfinite().all()) for x in outputs), "the model itself gives NaN"


def _first_lines(error: RingCompileError) -> str:
    return " | ".join(str(error).splitlines()[:2])


def _trace(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} in {place}: {str(error)[:300]}"


def _seeds(texts: list[str]) -> Iterator[int]:
    for text in texts:
        first, _, last = text.partition("-")
        yield from range(int(first), int(last or first) + 1)


def main() -> None:
    """Try seeds; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Random models against the compiler")
    parser.add_argument("seeds", nargs="+", help="SEED or FIRST-LAST")
    parser.add_argument("--wrong", type=Path, help="append wrong and crashed cases to this file")
    parser.add_argument("--short", action="store_true", help="words only of wrong and crashed ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    for seed in _seeds(options.seeds):
        case = case_of(seed)
        outcome = trial(case)
        counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
        bad = outcome.kind in ("wrong", "crashed")
        lines = [f"{seed}: {outcome.kind}: {outcome.detail}"]
        lines += [f"    {case.words()}"] if bad or not options.short else []
        print("\n".join(lines), flush=True)
        if bad and options.wrong:
            with options.wrong.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
    print(counts)


if __name__ == "__main__":
    main()
