"""Models whose weights torchao quantised: its tensor subclasses hold codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import ringcompile as rc
from tests.packed.block import WIDTH, Llama
from tests.packed.test_packed import bytes_of, ids
from tests.support import difference, run, some_fast

# A scale for each output, or for 16 inputs of each output, then with a zero point.
GROUP = 16
CODES, OUTPUTS, GROUPS = WIDTH * WIDTH, 4 * WIDTH, WIDTH * WIDTH // GROUP
# Of each kind how it is asked for, and the bytes that a rank of two has of q_proj and of o_proj,
# whose inputs are divided, so that scales for each output are whole.
KINDS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "int8": (Int8WeightOnlyConfig, (CODES + OUTPUTS) // 2, CODES // 2 + OUTPUTS),
    "int8 in groups": (
        lambda: Int8WeightOnlyConfig(granularity=PerGroup(GROUP)),
        *[(CODES + 5 * GROUPS) // 2] * 2),
    "int4 in groups, a byte each": (
        lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
        *[(CODES + 5 * GROUPS) // 2] * 2),
    "float8": (Float8WeightOnlyConfig, (CODES + OUTPUTS) // 2, CODES // 2 + OUTPUTS),
}
# Activations are rounded too. What another order of sums does to a number before it is rounded may
# be a whole step behind, so these are compared on plans that add up in the order of one device.
DYNAMIC: dict[str, Callable[[], Any]] = {
    "int8 times int8": Int8DynamicActivationInt8WeightConfig,
    "int8 times int4": lambda: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)),
}
CLOSE = 2e-6  # torchao quantises no weights in float64


def quantised(how: Any, layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = Llama(lambda i, o: nn.Linear(i, o, bias=False), layers).eval().requires_grad_(False)
    quantize_(model, how)
    return model


def check_numbers(model: nn.Module, program: Any, spec: str) -> Any:
    parallel = rc.transform(program, spec)
    for length in (16, 13):
        assert difference(run(parallel, (ids(length),)).outputs, model(ids(length))) < CLOSE
    return parallel


@pytest.mark.parametrize(
    ("name", "spec"),
    some_fast(KINDS, ("tp=2", "ring=2,tp=2"),
              fast=lambda name, spec: (name, spec) == ("int8 in groups", "tp=2")),
)
def test_codes_and_scales_are_shared_out(name: str, spec: str) -> None:
    how, of_q, of_o = KINDS[name]
    model = quantised(how())
    before = {key: (id(weight), type(weight)) for key, weight in model.named_parameters()}
    program = rc.capture(model, (ids(12),))
    assert before == {key: (id(weight), type(weight)) for key, weight in model.named_parameters()}
    parallel = check_numbers(model, program, spec)
    held = bytes_of(parallel, 1)
    for layer, expected in (("q_proj", of_q), ("o_proj", of_o)):
        assert sum(count for key, count in held.items() if layer in key) == expected


@pytest.mark.parametrize(
    ("name", "spec"),
    some_fast(DYNAMIC, ("tp=2", "pp=2"),
              fast=lambda name, spec: (name, spec) == ("int8 times int8", "tp=2")),
)
def test_activations_that_are_quantised_too(name: str, spec: str) -> None:
    model = quantised(DYNAMIC[name](), layers=2 if "pp" in spec else 1)
    check_numbers(model, rc.capture(model, (ids(12),)), spec)


def test_a_saved_program_holds_the_codes(tmp_path: Path) -> None:
    model = quantised(Int8WeightOnlyConfig())
    rc.transform(rc.capture(model, (ids(12),)), "tp=2").save(tmp_path / "out")
    loaded = rc.load(tmp_path / "out")
    assert difference(rc.run(loaded, (ids(13),)), model(ids(13))) < CLOSE
    codes = [w for w in loaded.program.weights.values() if w.dtype is torch.int8]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert sum(w.num_bytes for w in codes) == sum(layer.weight.numel() for layer in layers)
    assert rc.verify(loaded, inputs={"ids": ids(13)}).passed


def test_another_library_s_composite_op() -> None:
    """An op that a library makes of others is those others, whatever its namespace."""
    library = torch.library.Library("tests_packed", "FRAGMENT")
    library.define("scaled(Tensor codes, Tensor scale) -> Tensor")
    library.impl("scaled", lambda codes, scale: codes * scale, "CompositeImplicitAutograd")

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = torch.ops.tests_packed.scaled(self.weight, self.bias[:, None])
            return nn.functional.linear(x, weight)

    torch.manual_seed(0)
    model = Llama(Scaled, 1).double().eval().requires_grad_(False)
    check_numbers(model, rc.capture(model, (ids(12),)), "ring=2,tp=2")
