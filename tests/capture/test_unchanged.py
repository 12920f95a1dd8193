"""Capture leaves a model, its classes, its files and torch's settings as they were."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ringcompile.capture.export import capture
from ringcompile.errors import RingCompileError
from tests.support import some_fast

EXAMPLE = torch.randn(2, 13, 8)
TABLES: dict[str, Tensor] = {}
LATEST: list[Tensor] = []
LAST = None


@functools.lru_cache
def cached(scale: float) -> Tensor:
    return torch.full((8,), scale)


def remembers(x: Tensor, kept: list[Tensor] = []) -> Tensor:  # noqa: B006
    kept.append(x)
    return x


class Keeps(nn.Module):
    """Holds what a model may hold, in containers of containers."""

    calls = 0
    shared: list[Any] = []  # noqa: RUF012

    def __init__(self, change: Callable[[Keeps, Tensor], Any]) -> None:
        super().__init__()
        self.change = change
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.items = [1, [2], {"three": {3}}]
        self.cache = OrderedDict(a=deque([1]))
        self.settings = SimpleNamespace(mode="a", inner=SimpleNamespace(steps=[0]))
        self.table = torch.zeros(8)
        count = 0

        def counted() -> int:
            nonlocal count
            count += 1
            return count

        self.counted = counted

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return self.linear(x)


def install_hooks(m: Keeps, x: Tensor) -> None:
    m.linear.register_forward_hook(lambda *args: None)
    m.register_forward_pre_hook(lambda *args: None)


def set_attributes(m: Keeps, x: Tensor) -> None:
    m.seen = x
    m.settings.mode = "b"
    m.settings.inner.steps.append(x)
    m.settings.inner.new = x


def fill_containers(m: Keeps, x: Tensor) -> None:
    m.items[1].append(x)
    m.items[2]["three"].add(4)
    m.cache["a"].append(x)
    m.cache["b"] = x
    m.items.clear()


def add_parts(m: Keeps, x: Tensor) -> None:
    m.register_buffer("buffer", torch.zeros(3), persistent=False)
    m.extra = nn.Linear(2, 2)
    m.linear.extra = nn.ReLU()


def change_modes(m: Keeps, x: Tensor) -> None:
    m.norm.train()
    m.linear.weight.requires_grad_(False)
    m.linear.forward = lambda x: x
    m.norm.eps = 1.0


def count_calls(m: Keeps, x: Tensor) -> None:
    m.counted()


def fail_midway(m: Keeps, x: Tensor) -> None:
    install_hooks(m, x)
    fill_containers(m, x)
    raise ValueError("midway")


CHANGES = [install_hooks, set_attributes, fill_containers, add_parts, change_modes, count_calls]


def described(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """Everything in a value, by identity where that matters."""
    if id(value) in seen:
        return "again"
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        return (id(value), value.requires_grad, value._version)
    if isinstance(value, dict):
        return {key: described(held, seen) for key, held in value.items()}
    if isinstance(value, list | tuple | deque | set):
        return (type(value), [described(held, seen) for held in value])
    if isinstance(value, nn.Module | SimpleNamespace):
        return (id(value), described(vars(value), seen))
    if callable(value) and getattr(value, "__closure__", None):
        return [described(cell.cell_contents, seen) for cell in value.__closure__]
    return value


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_models(change: Callable[[Keeps, Tensor], Any]) -> None:
    model = Keeps(change).eval()
    model.settings.parent = model
    before = described(model)
    capture(model, (EXAMPLE,))
    assert described(model) == before


def test_a_capture_that_fails() -> None:
    model = Keeps(fail_midway).eval()
    before = described(model)
    with pytest.raises(RingCompileError, match="midway"):
        capture(model, (EXAMPLE,))
    assert described(model) == before


def keep_in_globals(m: Keeps, x: Tensor) -> None:
    global LAST
    TABLES["x"], LAST = x, x
    LATEST.append(x)
    Keeps.shared.append([x])
    Keeps.latest = x
    cached(2.0)
    remembers(x)


def test_traced_values_do_not_stay_in_globals_and_classes() -> None:
    table = torch.zeros(1)
    TABLES["kept"] = table
    # The comparison with the model is a call like any other: what it leaves is the model's own.
    capture(Keeps(keep_in_globals).eval(), (EXAMPLE,), compare_with_eager=False)
    assert (TABLES, LATEST, LAST, Keeps.shared) == ({"kept": table}, [], None, [])
    assert not hasattr(Keeps, "latest")
    assert not isinstance(cached(2.0), FakeTensor)
    assert remembers.__defaults__ == ([],)


def test_settings_of_torch() -> None:
    def change(m: Keeps, x: Tensor) -> None:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cpu", True)
        torch.set_float32_matmul_precision("medium")
        torch.manual_seed(5)
        random.random()

    def settings() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(), torch.get_rng_state().sum().item(),
            random.getstate(),
        )

    before = settings()
    with pytest.raises(RingCompileError), torch.random.fork_rng():
        capture(Keeps(lambda m, x: (change(m, x), fail_midway(m, x))).eval(), (EXAMPLE,))
    assert settings() == before


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 50,
}  # fmt: skip


@pytest.mark.parametrize("ran_before", some_fast([False, True], fast=lambda ran: not ran))
def test_hugging_face_records_outputs_once(ran_before: bool) -> None:
    """The hooks with which transformers collects hidden states are installed by the first call."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    ids = torch.arange(13)[None].repeat(2, 1)
    if ran_before:
        model(ids, output_hidden_states=True)
    capture(model, (ids,), {"output_hidden_states": True, "return_dict": True})
    config = vars(model.config).copy()
    capture(model, (ids,))
    assert vars(model.config) == config
    with torch.no_grad():
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        assert len(model(ids, output_attentions=False, output_hidden_states=True)[-1]) == 3


@pytest.mark.slow
def test_hugging_face_registries() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = set(ALL_ATTENTION_FUNCTIONS)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    capture(model, (torch.arange(13)[None].repeat(2, 1),))
    assert set(ALL_ATTENTION_FUNCTIONS) == before
