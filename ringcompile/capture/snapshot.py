"""What a model holds, at any depth, remembered and put back.

A forward may set attributes, fill dicts and lists, install hooks and keep what it computed; while
it is traced, all of that is about traced values. `Snapshot` walks everything that the model's
modules reach and remembers what each container held. Containers are restored in place, so that
whoever else holds one sees it as before. Data of tensors is not copied.

Beyond the model (globals and classes of the files that its modules are written in) only what holds
traced values is put back: a model may well have registered something there for good.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType, type,
)  # fmt: skip
# Packages whose objects are no state of a model; their plain containers are looked into.
_OTHERS = sys.stdlib_module_names - {"collections", "types", "argparse", "dataclasses"}
_CACHED = functools.lru_cache(lambda: None).__class__
_TRACED = (FakeTensor, torch.SymInt, torch.SymFloat, torch.SymBool)
Undo = Callable[[], Any]


class Snapshot:
    """The state of a model when this was made; `restore` brings it back."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Any] = {}  # by id; the objects are kept, so that ids stay theirs
        self._undo: list[Undo] = []
        self._walk([model])
        self._undo += [_without_traces(held) for held in _beyond(model)]

    def restore(self) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()

    def _walk(self, todo: list[Any]) -> None:
        while todo:
            value = todo.pop()
            if isinstance(value, _ATOMS) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            undo, children = _remembered(value)
            self._undo += undo
            todo += children


def _remembered(value: Any) -> tuple[list[Undo], list[Any]]:
    """How to undo changes of one object, and what it holds."""
    if isinstance(value, torch.Tensor):
        flag, grad = value.requires_grad, value.grad if value.is_leaf else None
        undo, children = _attributes(value)
        return [*undo, lambda: _restore_tensor(value, flag, grad)], children
    for kind, remember in _KINDS:
        if isinstance(value, kind):
            undo, children = remember(value)
            more, held = _attributes(value) if hasattr(value, "__dict__") else ([], [])
            return [*undo, *more], [*children, *held]
    if _is_foreign(type(value)):
        return [], []
    return _attributes(value)


def _is_foreign(kind: type) -> bool:
    top = kind.__module__.partition(".")[0]
    return top in _OTHERS or (top == "torch" and not issubclass(kind, nn.Module))


def _restore_tensor(tensor: torch.Tensor, flag: bool, grad: torch.Tensor | None) -> None:
    if tensor.requires_grad != flag and tensor.is_leaf:
        tensor.requires_grad_(flag)
    if tensor.is_leaf and tensor.grad is not grad:
        tensor.grad = grad


# -- kinds of objects ------------------------------------------------------------------------------


def _attributes(value: Any) -> tuple[list[Undo], list[Any]]:
    """Attributes in `__dict__` and in slots."""
    undo: list[Undo] = []
    children: list[Any] = []
    if isinstance(getattr(value, "__dict__", None), dict):
        undo, children = _mapping(vars(value))
    for name in _slots(type(value)):
        if hasattr(value, name):
            held = getattr(value, name)
            undo.append(functools.partial(setattr, value, name, held))
            children.append(held)
    return undo, children


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        found = base.__dict__.get("__slots__", ())
        names = (found,) if isinstance(found, str) else tuple(found)
        yield from (n for n in names if not n.startswith("__") and not _is_foreign(base))


def _mapping(value: dict[Any, Any]) -> tuple[list[Undo], list[Any]]:
    saved = list(value.items())

    def undo() -> None:
        if len(value) != len(saved) or any(
            key is not k or held is not v
            for (key, held), (k, v) in zip(value.items(), saved, strict=True)
        ):
            value.clear()
            value.update(saved)

    return [undo], [held for _, held in saved]


def _sequence(value: Any) -> tuple[list[Undo], list[Any]]:
    saved = list(value)

    def undo() -> None:
        value.clear()
        value.extend(saved)

    return [undo], saved


def _set(value: set[Any]) -> tuple[list[Undo], list[Any]]:
    saved = set(value)

    def undo() -> None:
        value.clear()
        value.update(saved)

    return [undo], list(saved)


def _function(value: types.FunctionType) -> tuple[list[Undo], list[Any]]:
    cells = [cell for cell in value.__closure__ or () if _is_filled(cell)]
    undo: list[Undo] = [
        functools.partial(setattr, cell, "cell_contents", cell.cell_contents) for cell in cells
    ]
    defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return undo, [*defaults, *(cell.cell_contents for cell in cells)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _cached(value: Any) -> tuple[list[Undo], list[Any]]:
    """What a cached function remembers cannot be told apart: if it is more, all is forgotten."""
    before = value.cache_info().currsize

    def undo() -> None:
        if value.cache_info().currsize != before:
            value.cache_clear()

    return [undo], [value.__wrapped__]


def _generator(value: torch.Generator) -> tuple[list[Undo], list[Any]]:
    return [functools.partial(value.set_state, value.get_state())], []


_KINDS: tuple[tuple[Any, Callable[[Any], tuple[list[Undo], list[Any]]]], ...] = (
    (dict, _mapping),
    ((list, deque), _sequence),
    (set, _set),
    ((tuple, frozenset), lambda value: ([], list(value))),
    (types.FunctionType, _function),
    (types.MethodType, lambda value: ([], [value.__self__, value.__func__])),
    (functools.partial, lambda value: ([], [value.func, *value.args, *value.keywords.values()])),
    (_CACHED, _cached),
    (torch.Generator, _generator),
)


# -- beyond the model ------------------------------------------------------------------------------


def _beyond(model: nn.Module) -> Iterable[Any]:
    """Classes of the model's modules and the globals of their files, torch's own left out."""
    classes = {
        base for module in model.modules() for base in type(module).__mro__
        if base is not object and not base.__module__.startswith("torch.")
    }
    files = {base.__module__ for base in classes}
    spaces = [vars(sys.modules[name]) for name in files if name in sys.modules]
    return [*classes, *spaces]


def _without_traces(holder: Any) -> Undo:
    """Undo changes in a class or in globals that leave traced values behind."""
    space: Mapping[str, Any] = vars(holder) if isinstance(holder, type) else holder
    saved = dict(space)
    inside = [_inside(value) for value in saved.values()]

    def undo() -> None:
        for undo_one in filter(None, inside):
            undo_one()
        for name, value in list(space.items()):
            if saved.get(name) is not value and _holds_traces(value):
                _put_back(holder, name, saved)

    return undo


def _put_back(holder: Any, name: str, saved: Mapping[str, Any]) -> None:
    if isinstance(holder, type):
        setattr(holder, name, saved[name]) if name in saved else delattr(holder, name)
    elif name in saved:
        holder[name] = saved[name]
    else:
        del holder[name]


def _inside(value: Any) -> Undo | None:
    """Undo changes of one container that leave traced values in it."""
    if isinstance(value, _CACHED):
        return _cached(value)[0][0]
    if isinstance(value, types.FunctionType):
        return _all_of([_inside(default) for default in value.__defaults__ or ()])
    if not isinstance(value, dict | list | set | deque):
        return None
    undo = _remembered(value)[0][0]
    return lambda: undo() if _holds_traces(value) else None


def _all_of(undo: list[Undo | None]) -> Undo | None:
    present = [each for each in undo if each is not None]

    def run() -> None:
        for each in present:
            each()

    return run if present else None


def _holds_traces(value: Any, depth: int = 4) -> bool:
    """Whether a value, or what it holds, is made of traced tensors or sizes."""
    if isinstance(value, _TRACED):
        return True
    if depth == 0 or isinstance(value, str | bytes):
        return False
    if isinstance(value, Mapping):
        return any(_holds_traces(held, depth - 1) for held in value.values())
    if isinstance(value, list | tuple | set | deque):
        return any(_holds_traces(held, depth - 1) for held in value)
    return False
