"""What tests share: compile a module, run all ranks, and hold the numbers against the model."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.models.transformer import Transformer
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import Result, run_lockstep

# Programs whose ranks fit together, so that another run of them need not check that again.
_VERIFIED: weakref.WeakValueDictionary[int, ParallelProgram] = weakref.WeakValueDictionary()
# What modules were captured as, by module; programs are never changed.
_CAPTURED: weakref.WeakKeyDictionary[nn.Module, dict[Any, Program]] = weakref.WeakKeyDictionary()
# The largest difference that float32 results may show, of the largest output.
TOLERANCE = 2e-5


def some_fast(
    *values: Iterable[Any], fast: Callable[..., bool]
) -> list[Any]:
    """Every combination of values as parameters of a test; all but the fast ones are slow."""
    return [
        pytest.param(*case, marks=() if fast(*case) else pytest.mark.slow)
        for case in product(*values)
    ]


def compiled(
    module: nn.Module, args: tuple[Any, ...], spec: str, kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> ParallelProgram:
    """Capture and transform; a module is captured once for the same inputs and weights."""
    return transform(captured(module.eval(), args, kwargs), spec, **options)


def captured(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Program:
    """What a module is captured as: the first call's, while weights and inputs are the same."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    state = [*module.parameters(), *module.buffers()]
    key = (
        str(structure),
        tuple(_value(leaf) for leaf in leaves),
        tuple((id(held), held.dtype, held._version) for held in state),
    )
    known = _CAPTURED.setdefault(module, {})
    if key not in known:
        known[key] = capture(module, args, kwargs)
    return known[key]


def zoo_program(model: str, name: str = "", **sizes: Any) -> Program:
    """What a model of the zoo is captured as, once for all tests that ask for it alike."""
    given = {key: size for key, size in sizes.items() if size not in (None, _DEFAULT.get(key))}
    program = _zoo_program(model, tuple(sorted(given.items())))
    return replace(program, name=name) if name else program


_DEFAULT = {"batch": 1}


@cache
def _zoo_program(model: str, sizes: tuple[tuple[str, Any], ...]) -> Program:
    return capture(*zoo.build(model, **dict(sizes)))


def captured_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: Any = None, **options: Any
) -> Program:
    """In place of `capture` in a command: a model of the zoo is captured once for all tests."""
    if not isinstance(model, Transformer):
        return capture(model, args, kwargs, **options)
    weight = next(model.parameters())
    loaded = None if isinstance(weight, FakeTensor) else weight.flatten()[:9].tolist()
    key = repr((model.config, weight.dtype, loaded, [_value(leaf) for leaf in args], options))
    if key not in _ZOO:
        _ZOO[key] = capture(model, args, kwargs, **options)
    return _ZOO[key]


_ZOO: dict[str, Program] = {}


def _value(leaf: Any) -> Any:
    """An input as a part of a key."""
    if not torch.is_tensor(leaf):
        return leaf
    if isinstance(leaf, FakeTensor):
        return (leaf.dtype, tuple(leaf.shape))
    return (leaf.dtype, tuple(leaf.shape), leaf.stride(), str(leaf.flatten().tolist()))


def run(parallel: ParallelProgram, inputs: Any) -> Result:
    """All ranks in lock-step, values held against their types, ranks checked against each other."""
    if _VERIFIED.get(id(parallel)) is not parallel:
        parallel.verify()
        _VERIFIED[id(parallel)] = parallel
    return run_lockstep(
        parallel.ranks(), parallel.mesh, parallel.source, inputs, check_types=True
    )


def difference(found: Any, expected: Any) -> float:
    """The largest difference over the largest expected value, over all outputs; NaN if one is."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    largest = furthest(float(e.abs().max()) for _, e in pairs)
    assert all(f.shape == e.shape and f.dtype == e.dtype for f, e in pairs)
    return furthest(float((f - e).abs().max()) for f, e in pairs) / max(largest, 1e-30)


def furthest(numbers: Iterable[float]) -> float:
    """The largest number; NaN if one is, where `max` may give any other."""
    return float(torch.tensor([*numbers], dtype=torch.float64).max())


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a nested value, in order."""
    leaves = pytree.tree_leaves(dict(value) if hasattr(value, "keys") else value)
    return [leaf.to(torch.float64) if leaf.dtype == torch.bool else leaf
            for leaf in leaves if torch.is_tensor(leaf)]


def counts(parallel: ParallelProgram, rank: int) -> dict[str, int]:
    """How often each of our ops stands in a rank's graph, but for padding and sorted rows."""
    names = (str(node.target).split(".") for node in parallel.rank(rank).graph.nodes)
    ours = Counter(name[1] for name in names if name[0] == "ringcompile")
    local = ("own_tokens", "padded_tokens", "sort_rows", "grouped_linear")
    return {name: n for name, n in ours.items() if name not in local}
