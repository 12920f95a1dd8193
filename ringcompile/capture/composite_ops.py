"""torch's `run_decompositions`, without what it does anew for each of 600 ops every time.

Ops that are composed of others stay whole in a graph that is traced again, because torch exchanges
the kernels of all such ops while it traces. It makes these kernels each time, looks each op up in
27 namespaces first, and for a small model that takes longer than all else. The kernels depend on
nothing but the op's own, so they are made once and exchanged as tables.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch.export import ExportedProgram
from torch.export import exported_program as torch_program

_UTILS = importlib.import_module("torch._export.utils")
_FAKE_RULES: dict[Any, Any] = getattr(
    importlib.import_module("torch._subclasses.fake_impls"), "op_implementations_dict", {}
)
_OVERRIDE = "_override_composite_implicit_decomp"
_PRESERVE = getattr(_UTILS, "_special_op_to_preserve_cia", None)
_MATERIALIZE = "_materialize_cpp_cia_ops"
_original: Any = getattr(torch_program, _OVERRIDE, None)


def decomposed(
    exported: ExportedProgram, table: Mapping[Any, Callable[..., Any]]
) -> ExportedProgram:
    """The same program traced again: ops of the table are taken apart, all others stay whole."""
    with looked_up_once():
        if _original is None or _PRESERVE is None:  # of another torch these may be other names
            with mock.patch.dict(_FAKE_RULES):  # torch takes away what it did not give
                return exported.run_decompositions(dict(table))
        with mock.patch.object(torch_program, _OVERRIDE, _kept_whole):
            return exported.run_decompositions(dict(table))


@contextlib.contextmanager
def looked_up_once() -> Iterator[None]:
    """While inside, torch looks up its composite ops once, and not for each of its namespaces."""
    done: list[bool] = []
    look_up = getattr(_UTILS, _MATERIALIZE, None)

    def once() -> None:
        if look_up is not None and not done:
            look_up()
            done.append(True)

    with mock.patch.object(_UTILS, _MATERIALIZE, once, create=True):
        yield


@dataclass(frozen=True)
class _Kernels:
    """The kernels of an op as they are, and while it is kept whole.

    Attributes:
        before: the op's own, by dispatch key; what is kept holds as long as these do.
        inside: those of torch while a graph is traced in which the op stays whole.
        rule: what computes the op's result for fake tensors inside; None where it has one.
    """

    before: dict[Any, Any]
    inside: dict[Any, Any]
    rule: Any


_known: dict[Any, _Kernels] = {}


@contextlib.contextmanager
def _kept_whole(callables: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """In place of torch's: the same for ops that are kept whole, by tables; its own for others."""
    whole = [op for op, function in callables.items() if function is _PRESERVE]
    others = {op: function for op, function in callables.items() if function is not _PRESERVE}
    _learn([op for op in whole if op not in _known or _known[op].before != op.py_kernels])
    with _exchanged(whole), _original(others):
        yield


def _learn(ops: list[Any]) -> None:
    """Keep what torch makes of the kernels of these ops."""
    if not ops:
        return
    before = {op: dict(op.py_kernels) for op in ops}
    ruled = {op: _FAKE_RULES[op] for op in ops if op in _FAKE_RULES}
    with _original(dict.fromkeys(ops, _PRESERVE)):
        for op in ops:
            rule = None if op in ruled else _FAKE_RULES.get(op)
            _known[op] = _Kernels(before[op], dict(op.py_kernels), rule)
    _FAKE_RULES.update(ruled)  # torch takes away what it did not give


@contextlib.contextmanager
def _exchanged(ops: list[Any]) -> Iterator[None]:
    """While inside, ops have the kernels with which they stay whole."""
    own = [(op, op.py_kernels) for op in ops]
    ruled = [op for op in ops if _known[op].rule is not None and op not in _FAKE_RULES]
    try:
        for op in ops:
            op.py_kernels = dict(_known[op].inside)
            op._dispatch_cache.clear()
        _FAKE_RULES.update((op, _known[op].rule) for op in ruled)
        yield
    finally:
        for op, kernels in own:
            op.py_kernels = kernels
            op._dispatch_cache.clear()
        for op in ruled:
            _FAKE_RULES.pop(op, None)
