"""Does an op need the host? A CUDA graph can only record what the device does on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Results whose value or size the host reads from the device, by torch's own account.
_READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
# Those that do so with a mask as the index alone.
_BY_MASK = ("aten.index.", "aten.index_put", "aten._index_put_impl", "aten._unsafe_index")
# A tensor that is made of the host's numbers.
_COPIES = "aten.lift_fresh.default"
# Copies, perhaps from device to device.
_MOVES = frozenset({"aten._to_copy.default", "aten.copy_.default"})
# What a tensor gives the host without an op that a dispatch mode sees.
_GIVES = frozenset({"tolist", "numpy", "__array__", "cpu", "__repr__"})
# What asks for numbers on CPUs alone: whether indices are in range, how many rows an expert has.
_ASKS_ON_CPU = ("aten.one_hot", "ringcompile.grouped_linear")


class NeedsHost(TorchDispatchMode):
    """Notes ops for which a GPU's host waits, or that copy the host's own numbers.

    Attributes:
        found: their names, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if _needs_host(func, args, kwargs or {}):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def everywhere(self) -> Iterator[NeedsHost]:
        """Notes methods of tensors too that no op stands behind."""
        with _Methods(self.found), self:
            yield self


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (name := getattr(func, "__name__", "")) in _GIVES:
            self.found.append(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


def _needs_host(func: Any, args: Any, kwargs: Any) -> bool:
    name = str(func)
    if name in _MOVES:
        devices = [x.device for x in args if isinstance(x, torch.Tensor)]
        devices += [torch.device(kwargs["device"])] if kwargs.get("device") else []
        return len({device.type for device in devices}) > 1
    if name.startswith(_BY_MASK):
        return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
                   for x in tree_leaves(args[1]))
    return name == _COPIES or not _READS.isdisjoint(func.tags)


def _asks_on_cpu(node: fx.Node, args: list[Any]) -> bool:
    tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
    return str(node.target).startswith(_ASKS_ON_CPU) and not any(x.is_cuda for x in tensors)


class HostWatch:
    """What an `Executor` calls in place of every op: it computes, and notes what needs the host.

    Attributes:
        found: the first node that does, and the op in it.
    """

    def __init__(self) -> None:
        self.found: tuple[fx.Node, str] | None = None

    def __call__(
        self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
    ) -> Any:
        """Compute one op."""
        if self.found is not None or _asks_on_cpu(node, args):
            return function(*args, **kwargs)
        with NeedsHost().everywhere() as mode:
            result = function(*args, **kwargs)
        if mode.found:
            self.found = (node, mode.found[0])
        return result
