"""Experts of transformers that a Python loop runs: captured row by row, equal to their loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoA, JetMoeMoE
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from tests.support import captured, difference, run, some_fast

WIDTH, INNER, EXPERTS = 16, 12, 4
SPECS = ("ring=2", "tp=2", "ep=2", "ring=2,time=2")


class Layer(nn.Module):
    """Causal attention, then experts of transformers on [T,D], chosen by a router."""

    def __init__(self, experts: nn.Module, choices: int = EXPERTS) -> None:
        super().__init__()
        self.experts, self.router = experts, nn.Linear(WIDTH, choices)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        y = x + y.transpose(1, 2).flatten(2)
        return y + self.routed(y.reshape(-1, WIDTH)).view(y.shape)

    def routed(self, rows: Tensor) -> Tensor:
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        return self.experts(rows, chosen, weights)


class Once(Layer):
    """One choice a token, and none for some."""

    def routed(self, rows: Tensor) -> Tensor:
        weights = self.router(rows).softmax(-1)
        chosen = nn.functional.one_hot(weights.argmax(-1), EXPERTS) * (weights > 0.26)
        return self.experts(rows, chosen.unsqueeze(1), weights.max(-1, keepdim=True).values)


class OfAMask(Layer):
    """What NLLB's experts are called with: a mask of ones and zeros, and weights behind it."""

    def routed(self, rows: Tensor) -> Tensor:
        weights = self.router(rows).softmax(-1)
        mask = nn.functional.one_hot(weights.argmax(-1), EXPERTS)
        return self.experts(rows, mask, weights * mask)


class InAll(Layer):
    """Experts with a router of their own, on [B,S,D]."""

    def routed(self, rows: Tensor) -> Tensor:
        return self.experts(rows.view(1, -1, WIDTH))


class OfQueries(Layer):
    """Queries made by experts, and what they lead to."""

    def routed(self, rows: Tensor) -> Tensor:
        queries, _, chosen = self.experts.map(rows.view(1, -1, WIDTH))
        return self.experts.reduce(queries.sin(), chosen)


JETMOE = transformers.JetMoeConfig(
    hidden_size=WIDTH, intermediate_size=INNER, kv_channels=4, num_key_value_heads=2,
    num_local_experts=EXPERTS, num_experts_per_tok=2,
)
KINDS: dict[str, Any] = {
    "dbrx": lambda: Layer(DbrxExperts(DbrxFFNConfig(
        hidden_size=WIDTH, ffn_hidden_size=INNER, moe_num_experts=EXPERTS))),
    "longcat": lambda: Layer(LongcatFlashExperts(transformers.LongcatFlashConfig(
        hidden_size=WIDTH, expert_ffn_hidden_size=INNER, n_routed_experts=EXPERTS,
        zero_expert_num=2)), EXPERTS + 2),
    "step3p7": lambda: Layer(Step3p7Experts(transformers.Step3p7TextConfig(
        hidden_size=WIDTH, moe_intermediate_size=INNER, num_local_experts=EXPERTS), 0.5)),
    "switch": lambda: Once(SwitchTransformersExperts(transformers.SwitchTransformersConfig(
        d_model=WIDTH, d_ff=INNER, num_experts=EXPERTS))),
    "nllb": lambda: OfAMask(NllbMoeExperts(transformers.NllbMoeConfig(
        d_model=WIDTH, num_experts=EXPERTS), INNER)),
    "jetmoe, mlp": lambda: InAll(JetMoeMoE(JETMOE)),
    "jetmoe, queries": lambda: OfQueries(JetMoeMoA(JETMOE)),
}  # fmt: skip


def built(name: str) -> nn.Module:
    module = KINDS[name]().double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.4))
    return module


def example(length: int) -> Tensor:
    return torch.linspace(-3, 3, length * WIDTH, dtype=torch.float64).view(1, length, -1).sin()


FAST = {"dbrx", "longcat", "nllb", "jetmoe, queries"}


@pytest.mark.parametrize("name", some_fast(KINDS, fast=FAST.__contains__))
def test_equal_to_the_loop(name: str) -> None:
    module = built(name)
    program = captured(module, (example(12),))
    for spec in SPECS:
        if (name, spec) == ("jetmoe, queries", "ep=2"):
            with pytest.raises(RingCompileError, match="reshape their rows between their matmuls"):
                transform(program, spec)
            continue
        for length in (12, 13):
            x = example(length)
            found = run(transform(program, spec), (x,)).outputs
            assert difference(found, module(x)) < 1e-10, (spec, length)


def test_a_loop_of_ones_own_is_refused_at_its_line() -> None:
    class Own(SwitchTransformersExperts):
        """Of no file of transformers, so that nothing is known of its loop."""

    module = built("switch")
    module.experts.__class__ = Own
    Own.forward = SwitchTransformersExperts.forward  # type: ignore[method-assign]
    with pytest.raises(RingCompileError, match="depends on the values of a tensor"):
        captured(module, (example(12),))
