"""Functions of states against those of transformers, which go in fixed chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import xLSTMConfig
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.rwkv import modeling_rwkv
from transformers.models.xlstm import modeling_xlstm

import ringcompile as rc
from ringcompile.capture import huggingface_states
from ringcompile.capture.huggingface_states import states_by_scan
from ringcompile.ops.running import recurrence
from tests.families.catalogue import FAMILIES
from tests.families.trial import CAPTURED, MATCHED, any_length, judged, reference
from tests.support import run

BATCH, HEADS, SIZE, STATES, GROUPS = 2, 4, 6, 5, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "as in layers": {"D": torch.linspace(-1, 1, HEADS), "dt_bias": torch.linspace(0, 1, HEADS),
                     "dt_softplus": True, "z": None, "return_final_states": False},
    "bounded steps": {"dt_bias": torch.linspace(0, 2, HEADS), "dt_limit": (0.5, 1.5)},
    "steps alone": {},
    "a state to begin from": {"initial_states": torch.ones(BATCH, HEADS, SIZE, STATES)},
    "a state to return": {"return_final_states": True},
}


def ours(module: ModuleType, name: str) -> Callable[..., Any]:
    """What takes the place of a function in a file of transformers."""

    class Layer(nn.Module):
        __module__ = module.__name__

    before = getattr(module, name)
    with states_by_scan(Layer()):
        found = getattr(module, name)
    assert getattr(module, name) is before
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
        found = ours(modeling_mamba2, "mamba2_chunk_scan")(*arguments, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"use_qk_l2norm_in_kernel": True},
                                  {"output_final_state": True}])
@pytest.mark.parametrize(("module", "name", "groups", "features"), [
    (modeling_qwen3_next, "torch_chunk_gated_delta_rule", GROUPS, 1),
    (modeling_kimi_linear, "chunk_kimi_delta_attention", HEADS, STATES),
])
def test_the_delta_rule_is_that_of_transformers(
    module: ModuleType, name: str, groups: int, features: int, more: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    for length in (1, 64, 70):
        q, k = (F.normalize(torch.randn(BATCH, length, groups, STATES), dim=-1) for _ in range(2))
        v = torch.randn(BATCH, length, HEADS, SIZE)
        decay = -torch.rand(BATCH, length, HEADS, features).squeeze(-1)
        given = {"g": decay, "beta": torch.rand(BATCH, length, HEADS), **more}
        torch.testing.assert_close(
            ours(module, name)(q, k, v, **given), getattr(module, name)(q, k, v, **given),
            rtol=1e-5, atol=1e-5,
        )


@pytest.mark.parametrize("rate", [-3.0, 2.0])
@pytest.mark.parametrize("largest", [1.0, 300.0])
def test_averages_of_rwkv(monkeypatch: pytest.MonkeyPatch, largest: float, rate: float) -> None:
    """Whatever keys are, and however fast they fade: exp of them would not be a number."""
    monkeypatch.setattr(huggingface_states, "op", lambda _: recurrence)
    torch.manual_seed(0)
    for length in (1, 2, 600):
        decay, first = torch.randn(SIZE) + rate, torch.randn(SIZE) * largest / 10
        k, v = torch.randn(BATCH, length, SIZE) * largest, torch.randn(BATCH, length, SIZE)
        found, _ = ours(modeling_rwkv, "rwkv_linear_attention")(decay, first, k, v)
        expected, _ = modeling_rwkv.rwkv_linear_attention(decay, first, k, v)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("largest", [1.0, 40.0])
def test_the_memory_of_xlstm(largest: float) -> None:
    torch.manual_seed(0)
    layer = modeling_xlstm.xLSTMBackend(xLSTMConfig(chunk_size=16))
    for length in (1, 2, 41, 70):
        q, k, v = (torch.randn(BATCH, HEADS, length, SIZE) for _ in range(3))
        gates = [torch.randn(BATCH, HEADS, length) * largest for _ in range(2)]
        expected, _ = layer(q, k, v, *gates)
        with states_by_scan(layer):
            found, _ = layer(q, k, v, *gates)
        # Where a sum cancels out, both are divided by next to nothing.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [
    "recurrent_gemma", "rwkv",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("mamba2", "kimi_linear", "minimax", "xlstm")),
])
def test_a_model_is_captured_for_all_lengths(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    program = rc.capture(model, (), family.example(CAPTURED))
    assert any_length(program)
    parallel = rc.transform(program, "ring=2")
    for length in (2, 2 * CAPTURED + 1):
        inputs = family.example(length)
        found = judged(family, run(parallel, inputs).outputs, reference(model, inputs), inputs)
        assert found.kind == MATCHED, found


def test_a_state_that_is_given_by_place_is_begun_from() -> None:
    torch.manual_seed(0)
    q, k, v = (F.normalize(torch.randn(BATCH, 9, HEADS, SIZE), dim=-1) for _ in range(3))
    decay, beta = -torch.rand(BATCH, 9, HEADS), torch.rand(BATCH, 9, HEADS)
    state = torch.randn(BATCH, HEADS, SIZE, SIZE)
    name, given = "torch_chunk_gated_delta_rule", (q, k, v, decay, beta, 64, state)
    expected = getattr(modeling_qwen3_next, name)(*given)
    torch.testing.assert_close(ours(modeling_qwen3_next, name)(*given), expected)


def test_a_model_that_its_first_call_changes_is_called_before() -> None:
    """RWKV scales weights down in its first call, to which capture would not be true."""
    family = replace(FAMILIES["rwkv"], called=False)
    with pytest.raises(rc.RingCompileError, match=r"changes 'rwkv\.blocks\.0\.att") as refused:
        rc.capture(family.build(), (), family.example(CAPTURED))
    assert "call the model once before it is captured" in str(refused.value)


def test_what_a_later_version_is_told_is_left_to_it() -> None:
    def original(query: Any, key: Any, value: Any, g: Any, beta: Any, scale: Any = None) -> str:
        return "the original's"

    x = torch.randn(1, 4, 2, 3)
    call = partial(huggingface_states._unless_begun, original, huggingface_states._delta_rule,
                   x, x, x, -torch.rand(1, 4, 2), torch.rand(1, 4, 2))
    assert call(scale=0.5) == "the original's"
    assert call()[0].shape == x.shape
