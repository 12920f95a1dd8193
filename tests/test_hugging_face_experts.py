"""Experts of transformers' models: on one device and on four ranks, against their own loop."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.runtime.inprocess import run_single
from tests.support import difference, run, some_fast

EXPERTS, CHOICES = 4, 2
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOICES}
PLAIN = {"num_experts": EXPERTS, "num_experts_per_tok": CHOICES}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {**LOCAL, "sliding_window": 6},
    "Qwen2Moe": {**PLAIN, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
    "Qwen3Moe": {**PLAIN, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    # Interleaved gates, matrices input by output, biases; sinks, a window in every other layer.
    "GptOss": {**LOCAL, "head_dim": 8, "sliding_window": 6,
               "layer_types": ["sliding_attention", "full_attention"]},
    "Olmoe": PLAIN,
    "Phimoe": LOCAL,
    "GraniteMoe": {**LOCAL, "attention_multiplier": 0.3},
}
# The slow ones have experts made from those of Qwen2Moe and Mixtral, or the same fields as these.
models = pytest.mark.parametrize(
    "name", some_fast(MODELS, fast=lambda name: name in ("Mixtral", "Qwen2Moe", "GptOss"))
)


def build(name: str) -> nn.Module:
    """Weights of a size that spreads scores, so that tokens go different ways."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    return model


def inputs(length: int) -> dict[str, torch.Tensor]:
    """Two sequences, the second with padding in front."""
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@lru_cache
def captured(name: str) -> tuple[nn.Module, Program]:
    model = build(name)
    return model, capture(model, (), inputs(14))


def seen(logits: torch.Tensor) -> torch.Tensor:
    """The rows that are not padding: what a row of padding gives is nobody's business."""
    return torch.cat([logits[0], logits[1, 3:]])


@models
def test_numbers(name: str) -> None:
    model, program = captured(name)
    given = inputs(22)
    with torch.no_grad():
        expected = seen(model(**given).logits)
    alone = run_single(program, program.source, given)
    assert difference(seen(alone["logits"]), expected) < 1e-5
    ranks = run(transform(program, "ring=4"), given)
    assert difference(seen(ranks.outputs["logits"]), expected) < 1e-5


@models
def test_tokens_go_different_ways(name: str) -> None:
    """Else the comparison could not tell one expert from another."""
    model, _ = captured(name)
    chosen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        for module in model.modules()
        if hasattr(module, "_is_expert_parallel")
    ]
    with torch.no_grad():
        model(**inputs(22))
    for hook in hooks:
        hook.remove()
    assert len(chosen) == SIZES["num_hidden_layers"]
    pairs = torch.cat(chosen).sort(-1).values
    assert len(pairs.unique()) > CHOICES
    assert len(pairs.unique(dim=0)) > CHOICES


@models
def test_tokens_stay_where_they_are(name: str) -> None:
    """Every expert on every rank: nothing is gathered or sent for the experts."""
    _, program = captured(name)
    rank = transform(program, "ring=4").rank(2)
    names = [str(node.target) for node in rank.graph.nodes]
    assert names.count("ringcompile.grouped_linear.default") == 2 * SIZES["num_hidden_layers"]
    assert "ringcompile.gather.default" not in names


# -- the hook by itself: what modules may declare --------------------------------------------------


class Norm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


class Experts(nn.Module):
    """A loop over experts as transformers' models have it, under all that may be declared."""

    def __init__(self, config: Any, has_gate: bool, has_bias: bool, transposed: bool, norm: bool):
        super().__init__()
        width, inner = 6, 5
        first = "gate_up_proj" if has_gate else "up_proj"
        for name, (rows, columns) in {
            first: (inner * (2 if has_gate else 1), width), "down_proj": (width, inner)
        }.items():  # fmt: skip
            shape = (columns, rows) if transposed else (rows, columns)
            setattr(self, name, nn.Parameter(torch.randn(3, *shape)))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(3, rows)))
        self.act_fn = nn.SiLU()
        self.declared = (first, has_gate, has_bias, transposed, norm)
        if norm:
            self.post_expert_norm = Norm()

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        first, has_gate, has_bias, transposed, norm = self.declared
        out = torch.zeros_like(x)

        def through(name: str, e: int, row: torch.Tensor) -> torch.Tensor:
            matrix = getattr(self, name)[e]
            made = row @ matrix if transposed else matrix @ row
            return made + getattr(self, f"{name}_bias")[e] if has_bias else made

        for t in range(x.shape[0]):
            for j in range(index.shape[1]):
                e = int(index[t, j])
                if e == 3:  # no expert
                    continue
                y = through(first, e, x[t])
                y = self._apply_gate(y) if has_gate else self.act_fn(y)
                y = through("down_proj", e, y)
                y = self.post_expert_norm(y) if norm else y
                out[t] += y * weights[t, j]
        return out


class Routed(transformers.PreTrainedModel):
    """Tokens of [B,S,6] to experts by their own values; some to none."""

    config_class = transformers.MixtralConfig

    def __init__(self, **declared: bool) -> None:
        super().__init__(transformers.MixtralConfig())
        from transformers.integrations.moe import use_experts_implementation

        options = {"has_gate": declared["has_gate"], "has_bias": declared["has_bias"],
                   "is_transposed": declared["transposed"],
                   "has_post_expert_norm": declared["norm"]}
        decorated = use_experts_implementation(type("E", (Experts,), {}), **options)
        self.experts = decorated(self.config, **declared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 6)
        index = torch.stack([(rows[:, 0] * 7).floor() % 4, (rows[:, 1] * 5).floor() % 4], -1).long()
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.experts(rows, index, rows[:, 2:4].to(wide).sigmoid()).reshape(x.shape)


def even(*flags: bool) -> bool:
    """Of four flags half of the choices, in which any three flags are chosen in every way."""
    return sum(flags) % 2 == 0


@pytest.mark.parametrize(
    ("has_gate", "has_bias", "transposed", "norm"), some_fast(*[(False, True)] * 4, fast=even)
)
def test_what_experts_declare(has_gate: bool, has_bias: bool, transposed: bool, norm: bool) -> None:
    model = Routed(has_gate=has_gate, has_bias=has_bias, transposed=transposed, norm=norm).eval()
    program = capture(model, (torch.randn(2, 9, 6),))
    model.config._experts_implementation = "eager"
    x = torch.randn(2, 13, 6)
    with torch.no_grad():
        expected = model(x)
    assert difference(run_single(program, program.source, (x,)), expected) < 2e-6
    assert difference(run(transform(program, "ring=3"), (x,)).outputs, expected) < 2e-6


def test_experts_that_are_spread_already_are_refused() -> None:
    model = build("Mixtral")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = True
    with pytest.raises(RingCompileError, match="MixtralExperts is already expert parallel"):
        capture(model, (), inputs(14))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.bfloat16, 4e-2)], ids=str
)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """In that of the tokens, also where their weights are in a wider one."""
    model = Routed(has_gate=True, has_bias=True, transposed=False, norm=False).to(dtype).eval()
    program = capture(model, (torch.randn(2, 9, 6, dtype=dtype),))
    model.config._experts_implementation = "eager"
    x = torch.randn(2, 13, 6, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
    assert difference(run_single(program, program.source, (x,)), expected) < tolerance
