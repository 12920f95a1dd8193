"""Arguments and results of any form: what is no tensor needs nothing from torch.export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ringcompile as rc
from ringcompile.capture.export import capture
from ringcompile.compiler import load, transform
from tests.support import TOLERANCE, difference, run, some_fast

WIDTH, CAPTURED, LENGTH = 16, 13, 22
Forward = Callable[..., Any]


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


@dataclass
class Batch:
    tokens: Tensor
    scale: float = 1.0


class Pair(NamedTuple):
    first: Tensor
    second: Any


class Module(nn.Module):
    """Attention, so that there is something to split, around a function of a test."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q = self.up(x).unflatten(-1, (2, -1)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.down(y.transpose(1, 2).flatten(2)) + x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def x(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(length + seed)
    return torch.randn(4, length, WIDTH, generator=generator)


Given = tuple[tuple[Any, ...], dict[str, Any]]
CASES: dict[str, tuple[Forward, Callable[[int], Given]]] = {
    "a flag by name": (
        lambda m, h, flag=False: m.attend(h) if flag else h, lambda n: ((x(n),), {"flag": True})
    ),
    "numbers and strings": (
        lambda m, h, mode, factor, on: m.attend(h) * factor if mode == "a" and on else h,
        lambda n: ((x(n), "a", 2.5, True), {}),
    ),
    "tensors by any name": (
        lambda m, h, **more: m.attend(h + more["bias"]) * more["factor"],
        lambda n: ((x(n),), {"factor": 2, "bias": x(n, 1), "unused": None}),
    ),
    "tensors in any number": (
        lambda m, h, *more: m.attend(h) + more[0] * more[2], lambda n: ((x(n), x(n, 1), 3, 4), {})
    ),
    "a list": (lambda m, xs: m.attend(xs[0]) + xs[1], lambda n: (([x(n), x(n, 1)],), {})),
    "dicts in a tuple": (
        lambda m, given: m.attend(given[0]["a"]) + given[1]["a"],
        lambda n: ((({"a": x(n)}, {"a": x(n, 1)}),), {}),
    ),
    "a dataclass": (
        lambda m, batch: m.attend(batch.tokens) * batch.scale, lambda n: ((Batch(x(n), 0.5),), {})
    ),
    "a named tuple": (
        lambda m, pair: m.attend(pair.first) * pair.second, lambda n: ((Pair(x(n), 2.0),), {})
    ),
    "return_dict": (
        lambda m, h, **o: {"out": m.attend(h), "loss": None} if o["return_dict"] else h,
        lambda n: ((x(n),), {"return_dict": True}),
    ),
    "returns a dataclass": (lambda m, h: Output(m.attend(h)), lambda n: ((x(n),), {})),
    "returns None and constants": (
        lambda m, h: (m.attend(h), None, {"kind": "a", "scale": 1.5, "flags": [True, None, 3]}),
        lambda n: ((x(n),), {}),
    ),
    "returns a named tuple": (lambda m, h: Pair(m.attend(h), None), lambda n: ((x(n),), {})),
    "returns one tensor twice, and an input": (
        lambda m, h: (lambda y: [y, (y, h)])(m.attend(h)), lambda n: ((x(n),), {})
    ),
}  # fmt: skip


def leaves(value: Any) -> list[Any]:
    plain = vars(value) if isinstance(value, Output | Batch) else value
    return pytree.tree_leaves(plain, lambda leaf: leaf is None)


def tensors(given: Given) -> tuple[Tensor, ...]:
    args, kwargs = given
    found = [leaves(leaf) for leaf in leaves((args, kwargs))]
    return tuple(leaf for leaf in pytree.tree_leaves(found) if torch.is_tensor(leaf))


def matches(module: nn.Module, found: Any, given: Given) -> None:
    args, kwargs = given
    with torch.no_grad():
        expected = leaves(module(*args, **kwargs))
    assert len(leaves(found)) == len(expected)
    for mine, its in zip(leaves(found), expected, strict=True):
        if torch.is_tensor(its):
            assert difference(mine, its) <= TOLERANCE
        else:
            assert (mine, type(mine)) == (its, type(its))


FAST = {
    "numbers and strings", "tensors by any name", "dicts in a tuple", "a dataclass",
    "returns None and constants",
}  # fmt: skip


@pytest.mark.parametrize("name", some_fast(CASES, fast=FAST.__contains__))
def test_arguments_and_results(name: str) -> None:
    function, make = CASES[name]
    module = Module(function).eval()
    args, kwargs = make(CAPTURED)
    parallel = transform(capture(module, args, kwargs), "ring=3")
    matches(module, run(parallel, tensors(make(LENGTH))).outputs, make(LENGTH))


@pytest.mark.parametrize("spec", some_fast(["pp=2", "dp=2"], fast=lambda spec: spec == "pp=2"))
def test_batches_dealt_out_join_what_is_a_tensor(spec: str) -> None:
    function, make = CASES["returns None and constants"]
    module = Module(function).eval()
    parallel = transform(capture(module, (x(CAPTURED)[:2],)), spec)
    matches(module, rc.run(parallel, tensors(make(LENGTH))), make(LENGTH))


def test_names_of_inputs() -> None:
    """By their argument, or by their own name where `**kwargs` takes them."""
    program = capture(Module(CASES["tensors by any name"][0]), *CASES["tensors by any name"][1](13))
    assert [spec.name for spec in program.inputs] == ["args_0", "bias"]
    nested = capture(Module(CASES["dicts in a tuple"][0]), *CASES["dicts in a tuple"][1](13))
    assert [spec.name for spec in nested.inputs] == ["args_0_0_a", "args_0_1_a"]


def test_constants_are_saved(tmp_path: Path) -> None:
    function, make = CASES["returns None and constants"]
    module = Module(function).eval()
    transform(capture(module, *make(CAPTURED)), "ring=2").save(tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert "'kind': 'a'" not in str(loaded.program)
    assert "kind: 'a', scale: 1.5, flags: [True, None, 3]" in str(loaded.program)
    matches(module, rc.run(loaded, tensors(make(LENGTH))), make(LENGTH))


def eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model": lambda module: eager(module),
    "in place": lambda module: in_place(module),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models(name: str) -> None:
    module = Module(lambda m, h: m.attend(h)).eval()
    program = capture(COMPILED[name](module), (x(CAPTURED),))
    assert program.name == "Module"
    assert {w.name for w in program.weights.values()} == dict(module.named_parameters()).keys()
    with torch.no_grad():
        expected = module.attend(x(LENGTH))
    assert difference(run(transform(program, "ring=2"), (x(LENGTH),)).outputs, expected) < TOLERANCE


class Thing:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class KeyCache:
    pass


REFUSED: dict[str, tuple[Forward, Given, str]] = {
    "an object that holds tensors": (
        lambda m, h, thing: h + thing.tensor, ((x(13), Thing(x(13))), {}),
        """error: the argument 'args_1' is a Thing, which holds tensors
  hint: pass tensors, or tuples, lists, dicts and dataclasses of them""",
    ),
    "a result of another kind": (
        lambda m, h: (h, {1, 2}), ((x(13),), {}),
        """error: the model returns a set besides its tensors
  hint: return tensors, or tuples, lists, dicts and dataclasses of them""",
    ),
    "a length as a result": (
        lambda m, h: (h, h.shape[1]), ((x(13),), {}),
        """error: the model returns a number that depends on the sequence length besides its tensors
  hint: compute it from the shapes of the inputs instead""",
    ),
    "a cache": (
        lambda m, h: (h, KeyCache()), ((x(13),), {}),
        """error: the model returns a cache of keys and values besides its tensors
  hint: call it with use_cache=False""",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, (args, kwargs), text = REFUSED[name]
    with pytest.raises(rc.RingCompileError) as caught:
        capture(Module(function).eval(), args, kwargs)
    assert str(caught.value) == text


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(rc.RingCompileError, match=r"do not fit Linear.forward: too many pos"):
        capture(nn.Linear(WIDTH, WIDTH), (x(13), x(13)))
