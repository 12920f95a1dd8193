"""The least time a step can take: for each op, its arithmetic or its bytes, whichever is more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ringcompile.ir.call_text import op_name
from ringcompile.ir.calls import Call
from ringcompile.ops.blocks import Band, pieces


@dataclass
class Roofline:
    """Watches a run (see `Executor`), and adds up what its ops must do.

    Attributes:
        flops_per_second: what the matrix units reach.
        bytes_per_second: what the memory reaches.
        seconds: the least time, by op.
        flops: of all ops.
        bytes: of all ops.
    """

    flops_per_second: float
    bytes_per_second: float
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: float = 0.0
    bytes: float = 0.0

    def __call__(
        self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
    ) -> Any:
        """Run an op and count it."""
        result = function(*args, **kwargs)
        read, written = _tensors((args, kwargs)), _tensors(result)
        storages = {x.untyped_storage().data_ptr() for x in read}
        name = op_name(node)
        made = [x for x in written if x.untyped_storage().data_ptr() not in storages]
        if not made and name not in _IN_PLACE:
            return result  # a view
        moved = sum(map(_num_bytes, [*read, *written]))
        flops = _FLOPS.get(name, lambda *_: 0.0)(node, args, kwargs, result)
        self.flops += flops
        self.bytes += moved
        self.seconds[name] += max(flops / self.flops_per_second, moved / self.bytes_per_second)
        return result

    @property
    def total(self) -> float:
        """The least seconds of the whole step."""
        return sum(self.seconds.values())


_IN_PLACE = {"attend_merge", "merge"}


def _num_bytes(x: torch.Tensor) -> int:
    """What is behind a tensor: of an expanded one, each number once."""
    shape = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * torch.Size(shape).numel()


def moved_bytes(value: Any) -> int:
    """The bytes of all tensors in nested values, each storage no more than once."""
    found = {(x.untyped_storage().data_ptr(), x.storage_offset(), x.shape): x
             for x in _tensors(value)}
    return sum(map(_num_bytes, found.values()))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [x for part in value for x in _tensors(part)]
    return []


def _product(node: fx.Node, args: list[Any], kwargs: dict[str, Any], result: Any) -> float:
    return 2.0 * result.numel() * args[0].shape[-1]


def _block(node: fx.Node, args: list[Any], kwargs: dict[str, Any], result: Any) -> float:
    """Of the pairs that are visible."""
    names = list(Call(node).arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    q, head_dim = given["q"], kwargs["head_dim"]
    band = Band(kwargs.get("lower"), kwargs.get("upper"))
    rows = pieces(kwargs["queries"], kwargs["chunk"], 2**62, q.shape[2])
    columns = pieces(kwargs["keys"], kwargs["chunk"], kwargs["limit"], given["kv"][0].shape[2])
    pairs = sum(
        _visible(band, row.start, row.length, column.start, column.length)
        for row in rows for column in columns
    )
    return 2.0 * pairs * q.shape[0] * q.shape[1] * (head_dim + result[0].shape[3])


def _visible(band: Band, query: int, rows: int, key: int, columns: int) -> float:
    apart = torch.arange(query, query + rows)[:, None] - torch.arange(key, key + columns)
    seen = torch.ones_like(apart, dtype=torch.bool)
    if band.lower is not None:
        seen &= apart >= band.lower
    if band.upper is not None:
        seen &= apart <= band.upper
    return float(seen.sum())


def _whole(node: fx.Node, args: list[Any], kwargs: dict[str, Any], result: Any) -> float:
    """Attention of whole heads: the band over all rows and keys."""
    q, k = args[0], args[1]
    band = Band(kwargs.get("lower"), kwargs.get("upper"))
    pairs = _visible(band, 0, q.shape[2], 0, k.shape[2])
    return 2.0 * pairs * q.shape[0] * q.shape[1] * (q.shape[3] + result.shape[3])


_FLOPS: dict[str, Callable[..., float]] = {
    "linear": _product, "matmul": _product, "bmm": _product, "mm": _product,
    "block_attention": _block, "attend_merge": _block, "attention": _whole,
}
