"""PyTorch's associative_scan, read as the scan that its combining function stands for.

The function is tried on random numbers against those of the scans that there are: sums, products,
largest and smallest entries, logarithms of sums, and the linear recurrence
y[t] = a[t] * y[t - 1] + b[t], which state space models and gated recurrences are. The graph then
holds that scan, which goes on from rank to rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import permutations
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ringcompile.errors import RingCompileError
from ringcompile.ops.schemas import op

_MODULE = "torch._higher_order_ops.associative_scan"
_Tensors = Sequence[torch.Tensor]
_SCALES = (0.3, 1.0, 30.0)


@dataclass(frozen=True)
class _Kind:
    """A scan: how two results are put together, and all of it along dim 0."""

    combine: Callable[..., tuple[torch.Tensor, ...]]
    scan: Callable[..., tuple[torch.Tensor, ...]]


_OF_ONE = (
    _Kind(lambda x, y: (x + y,), lambda x: (x.cumsum(0),)),
    _Kind(lambda x, y: (x * y,), lambda x: (x.cumprod(0),)),
    _Kind(lambda x, y: (torch.maximum(x, y),), lambda x: (x.cummax(0).values,)),
    _Kind(lambda x, y: (torch.minimum(x, y),), lambda x: (x.cummin(0).values,)),
    _Kind(lambda x, y: (torch.logaddexp(x, y),), lambda x: (x.logcumsumexp(0),)),
)
_OF_TWO = (
    _Kind(
        lambda a, b, c, d: (a * c, c * b + d),
        lambda a, b: (a.cumprod(0), op("recurrence")(*torch.broadcast_tensors(a, b), dim=0)),
    ),
)
_KINDS = {1: _OF_ONE, 2: _OF_TWO}


@contextlib.contextmanager
def read_as_scans() -> Iterator[None]:
    """While inside, calls of associative_scan become scans that every pass knows."""
    with mock.patch.multiple(
        import_module(_MODULE), create=True,  # of another torch these may be other names
        generic_associative_scan=_scan,
        associative_scan_op=_scan,
        _maybe_compile_and_run_fn=lambda function, *args: function(*args),
    ):
        yield


def _scan(
    combine: Callable[..., Any], leaves: _Tensors, dim: int = 0, additional_inputs: Any = ()
) -> list[torch.Tensor]:
    """What associative_scan returns, as a flat list; the entries lie in dim 0."""
    assert dim == 0
    assert not additional_inputs
    for order in permutations(range(len(leaves))):
        for kind in _KINDS.get(len(leaves), ()):
            if all(_agree(combine, kind, order, leaves, scale) for scale in _SCALES):
                found = kind.scan(*(leaves[place] for place in order))
                return [found[order.index(place)] for place in range(len(leaves))]
    raise RingCompileError(
        "associative_scan is called with a combining function that is not supported",
        hint="supported are sums, products, maxima, minima, logaddexp, and, for "
             "pairs (a, b), the linear "
        "recurrence (a1 * a2, a2 * b1 + b2)",
    )


def _agree(
    combine: Callable[..., Any], kind: _Kind, order: Sequence[int], leaves: _Tensors, scale: float
) -> bool:
    """Whether the user's function is this one on random numbers of such a size."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        random = torch.Generator().manual_seed(0)
        left, right = (
            [torch.randn(_small(x), generator=random, dtype=torch.float64) * scale for x in leaves]
            for _ in range(2)
        )
        try:
            found = pytree.tree_leaves(combine(*left, *right))
        except Exception:  # a function of fixed sizes, or of tensors from outside
            return False
        wanted = kind.combine(*(side[place] for side in (left, right) for place in order))
        return all(
            found[place].shape == want.shape and torch.allclose(found[place], want, 1e-12, 1e-12)
            for place, want in zip(order, wanted, strict=True)
        )


def _small(x: torch.Tensor) -> list[int]:
    """A shape like that of x: sizes that vary are 2."""
    return [3, *(size if isinstance(size, int) else 2 for size in x.shape[1:])]
