"""What a program would allocate, from its types and its arguments, before anything is allocated.

A saved program states the type of every value; arguments such as those of `full` can ask for more.
Both are compared on torch's meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ringcompile.ir.calls import map_values
from ringcompile.ir.nodes import error_at
from ringcompile.ir.types import TensorType
from ringcompile.runtime.steps import Slot, Step

# What an op may always make: data-dependent sizes and scratch of small programs stay below it.
_SMALL = 64 << 20
_FEW = 1 << 20
# An op may make so many times the bytes that it reads, however many that are.
_TIMES = 4096
# And so many bytes for each pair of tokens: masks and biases are made from nothing.
_A_PAIR = 64
# Arguments of our own operators that are numbers of rows or columns.
_COUNTS = frozenset({"chunk", "each", "ways", "lead", "head_dim"})
Shape = Callable[[TensorType], tuple[Any, ...]]
# Of every node, in order, the shapes and dtypes of what it gives.
Results = list[list[tuple[tuple[Any, ...], torch.dtype]]]


def check_memory(
    nodes: Sequence[fx.Node], steps: Sequence[Step], shape_of: Shape, device: torch.device,
    pairs: int,
) -> None:
    """Refuse a program that cannot be held, or that asks for more than fits what it is given.

    Types say how large each value is, and an op is held to its type. A type may be false as well:
    what is much larger than all weights and inputs, and than what the op reads, is refused too.

    Args:
        nodes: of the graph, in order; slots are their indices.
        steps: the calls in order, with their arguments bound.
        shape_of: the local shape of a type; sizes that only the data tells stay symbols.
        device: where tensors will be put.
        pairs: sequences times tokens times tokens of a run.

    Raises:
        RingCompileError: by the node, with the bytes.
    """
    available = _available(device)
    results = [[(shape_of(t), t.dtype) for t in _types(node)] for node in nodes]
    sizes = [sum(_bytes(shape, dtype) for shape, dtype in each) for each in results]
    for node, size in zip(nodes, sizes, strict=True):
        if size > available:
            raise error_at(
                node, f"%{node.name} needs {_text(size)} of memory, and {_text(available)} are "
                      "available",
                hint="use more ranks, a shorter sequence or a smaller batch",
            )
    allowed = max(_SMALL, *sizes)
    given = sum(size for node, size in zip(nodes, sizes, strict=True) if node.op == "placeholder")
    usual = max(_SMALL, given, _A_PAIR * pairs)
    slot_of = {node: slot for slot, node in enumerate(nodes)}
    known: dict[str, int] = {}
    for step in steps:
        _check_counts(step, results)
        if not str(step.node.target).startswith("aten."):
            continue
        made = _made(step, results, known)
        if made > allowed:
            raise error_at(
                step.node,
                f"%{step.node.name} would take {_text(made)}, but its type says "
                f"{_text(sizes[step.out])}", hint="do not use this artifact",
            )
        read = sum(sizes[slot_of[operand]] for operand in step.node.all_input_nodes)
        if made > max(usual, _TIMES * read):
            raise error_at(
                step.node,
                f"%{step.node.name} would take {_text(made)}, made from {_text(read)}; all weights "
                f"and inputs of the program are {_text(given)}", hint="do not use this artifact",
            )


def _check_counts(step: Step, results: Results) -> None:
    """Numbers of rows that our own operators are told: there is a tensor as long."""
    for name in _COUNTS & step.kwargs.keys():
        value = step.kwargs[name]
        if not isinstance(value, int) or value <= _FEW:
            continue
        lengths = [n for each in results for shape, _ in each for n in shape if isinstance(n, int)]
        if value > max(lengths, default=0):
            raise error_at(
                step.node, f"'{name}' of %{step.node.name} is {value}, and no tensor is that long",
                hint="do not use this artifact",
            )


def _made(step: Step, results: Results, known: dict[str, int]) -> int:
    """The bytes that a torch op would make; 0 where shapes alone do not tell."""

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Slot):
            return value
        ((shape, dtype),) = results[value.index]
        return torch.empty(shape, dtype=dtype, device="meta")

    key = repr((str(step.node.target), map_values(
        (step.args, step.kwargs), lambda v: results[v.index] if isinstance(v, Slot) else v
    )))
    if key not in known:
        try:
            args, kwargs = map_values((step.args, step.kwargs), stand_in)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "meta"}
            with torch.no_grad():
                made = step.node.target(*args, **kwargs)  # type: ignore[operator]
            known[key] = sum(t.nbytes for t in tree_leaves(made) if torch.is_tensor(t))
        except Exception:  # what cannot run on shapes fails when it runs, or depends on the data
            known[key] = 0
    return known[key]


def _types(node: fx.Node) -> tuple[TensorType, ...]:
    value = node.meta.get("type")
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _bytes(shape: tuple[Any, ...], dtype: torch.dtype) -> int:
    if not all(isinstance(size, int) for size in shape):
        return 0
    return math.prod(shape) * dtype.itemsize


def _available(device: torch.device) -> int:
    """All memory of the machine, or of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
