"""Low-rank adapters: beside a weight, merged into it, normed with it, beside a packed one."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.packed.block import LAYERS, Llama
from tests.packed.layouts import Gptq, Nf4, Packed
from tests.packed.test_packed import bytes_of, check_numbers, ids, in_double, is_row_parallel
from tests.support import compiled, some_fast

_RANK = 4
_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CONFIGS = {
    "LoRA": {}, "LoRA, scaled by the root": {"use_rslora": True}, "LoRA with biases":
    {"lora_bias": True}, "DoRA": {"use_dora": True}, "LoRA of a table":
    {"target_modules": [*_LAYERS, "embed_tokens", "lm_head"]},
}


def adapted(name: str, merged: bool = False, layers: int = 1) -> nn.Module:
    """A Llama with an adapter of PEFT in every linear layer."""
    torch.manual_seed(0)
    given = {"target_modules": _LAYERS, **_CONFIGS[name]}
    bias = "lora_bias" in given
    model = Llama(lambda i, o: nn.Linear(i, o, bias=bias), layers)
    config = peft.LoraConfig(r=_RANK, lora_alpha=8, init_lora_weights=False, **given)
    with_adapters = peft.get_peft_model(model, config)
    if merged:
        return in_double(with_adapters.merge_and_unload())
    return in_double(with_adapters.base_model.model)


@pytest.mark.parametrize(
    ("name", "merged", "spec"),
    some_fast(
        _CONFIGS, (False, True), ("tp=2", "ring=2,tp=2", "pp=2"),
        fast=lambda name, merged, spec: spec == "ring=2,tp=2" and name in ("LoRA", "DoRA"),
    ),
)
def test_adapters_of_peft(name: str, merged: bool, spec: str) -> None:
    check_numbers(adapted(name, merged, 2 if spec == "pp=2" else 1), spec)


class QLora(nn.Module):
    """A packed layer with an adapter beside it."""

    def __init__(self, base: Packed) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, _RANK, bias=False)
        self.lora_B = nn.Linear(_RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2


def check_adapters(model: nn.Module) -> None:
    """The thin dim of an adapter is whole; the wide one is cut where the layer's own weight is."""
    parallel = compiled(model, (ids(12),), "tp=2")
    sizes = {w.name: w.num_bytes for w in parallel.program.weights.values()}
    for name, count in bytes_of(parallel, 1).items():
        cut = "lora_A" if is_row_parallel(name) else "lora_B"
        if "lora_" in name:
            assert count == sizes[name] // (2 if cut in name else 1), name
        if name.endswith("base_layer.weight"):
            assert count == sizes[name] // 2, name


def test_only_the_wide_dim_of_an_adapter_is_cut() -> None:
    check_adapters(adapted("LoRA"))


@pytest.mark.parametrize(
    "kind", [Nf4, pytest.param(Gptq, marks=pytest.mark.slow)], ids=lambda kind: kind.__name__
)
def test_an_adapter_beside_a_packed_weight(kind: type[Packed]) -> None:
    torch.manual_seed(0)
    model = in_double(Llama(lambda i, o: QLora(kind(i, o)), LAYERS // 2))
    check_numbers(model, "ring=2,tp=2")
    check_adapters(model)


def test_the_norm_of_dora_is_of_the_rows_that_a_rank_has() -> None:
    """Where tp cuts the outputs; where it cuts the inputs, a norm needs the whole row."""
    parallel = compiled(adapted("DoRA"), (ids(12),), "tp=2")
    sizes = {w.name: w.num_bytes for w in parallel.program.weights.values()}
    held = {name: count for name, count in bytes_of(parallel, 0).items()
            if name.endswith("base_layer.weight") and not is_row_parallel(name)}
    assert len(held) == 5
    assert all(count == sizes[name] // 2 for name, count in held.items())
