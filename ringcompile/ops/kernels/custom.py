"""Our own kernels, in Triton: head dims above 256, blocks folded into an accumulator, decoding.

Triton is optional. Its modules are imported when the first tensors come that it is for; without
it, or with one that lacks what a kernel is written in, the providers say so and refuse.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ringcompile.ops.kernels.contract import (
    HALVES,
    BlockCall,
    Provider,
    masked,
    not_half,
    older_gpu,
    strided_last_dim,
    unaligned,
)

# Triton's own switch, read when it is imported: kernels then run on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICE = "cpu" if INTERPRETED else "cuda"
_HEAD_DIMS = range(257, 513)
_FEW_QUERIES = 8
_DECODE_FLOATS = (*HALVES, torch.float32)


@lru_cache
def load(name: str) -> ModuleType | str:
    """A module of kernels, or why it is not there."""
    try:
        return import_module(f"ringcompile.ops.kernels.{name}")
    except ImportError as error:
        return f"this Python has no fitting Triton: {error}"


def _refuses(call: BlockCall) -> str | None:
    if not {call.q.shape[3], call.v.shape[3]} <= set(_HEAD_DIMS):
        return (
            f"head_dim of q and k is {call.q.shape[3]}, of v {call.v.shape[3]}, it takes "
            f"{_HEAD_DIMS.start} to {_HEAD_DIMS.stop - 1}"
        )
    if call.scale <= 0:
        return f"the scale is {call.scale}, it takes positive ones"
    return (
        masked(call) or not_half(call) or strided_last_dim(call) or unaligned(call)
        or _repeated(call)
    )


def _repeated(call: BlockCall) -> str | None:
    # The copy engine takes no stride of 0.
    expanded = (
        stride == 0 < size - 1
        for x in (call.q, call.k, call.v)
        for size, stride in zip(x.shape, x.stride(), strict=True)
    )
    return "a dim is expanded" if any(expanded) else None


def _triton_refuses(call: BlockCall) -> str | None:
    reason = _refuses(call) or (None if INTERPRETED else older_gpu(call, (9, 0)))
    return reason or _missing("triton_kernel")


def _hopper_refuses(call: BlockCall) -> str | None:
    if reason := _refuses(call):
        return reason
    if torch.cuda.get_device_capability(call.q.device) != (9, 0):
        return "the GPU is not of compute capability 9.0"
    return _missing("hopper_kernel")


def _decode_refuses(call: BlockCall) -> str | None:
    if call.q.shape[2] > _FEW_QUERIES:
        return f"there are {call.q.shape[2]} queries, it takes up to {_FEW_QUERIES}"
    if max(call.q.shape[3], call.v.shape[3]) >= _HEAD_DIMS.stop:
        return f"a head_dim is above {_HEAD_DIMS.stop - 1}"
    if call.q.dtype not in _DECODE_FLOATS:
        return f"dtype is {call.q.dtype}, it takes float16, bfloat16 and float32"
    reason = None if INTERPRETED else older_gpu(call, (8, 0))
    return reason or strided_last_dim(call) or _missing("decode_kernel")


def _missing(module: str) -> str | None:
    found = load(module)
    return found if isinstance(found, str) else None


def _provider(
    name: str,
    device: str,
    module: str,
    refuses: Callable[[BlockCall], str | None],
    *,
    folds: bool = True,
    softcap: bool = False,
) -> Provider:
    def run(call: BlockCall) -> tuple[Tensor, Tensor]:
        out = _like_query(call)
        lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
        _launch(module, call, out, lse, fold=False)
        return out, lse

    def fold(call: BlockCall, out: Tensor, lse: Tensor) -> None:
        _launch(module, call, out, lse, fold=True)

    return Provider(name, device, refuses, run, softcap, fold if folds else None)


def _launch(module: str, call: BlockCall, out: Tensor, lse: Tensor, *, fold: bool) -> None:
    kernels = load(module)
    assert isinstance(kernels, ModuleType)
    if call.q.is_cuda and call.q.device.index != torch.cuda.current_device():
        with torch.cuda.device(call.q.device):
            kernels.launch(call, out, lse, fold=fold)
    else:
        kernels.launch(call, out, lse, fold=fold)


def _like_query(call: BlockCall) -> Tensor:
    """Memory for the output, its dims laid out as q's: views back to tokens stay views."""
    order = sorted(range(3), key=lambda dim: call.q.stride(dim), reverse=True)
    sizes = [*(call.q.shape[dim] for dim in order), call.v.shape[3]]
    dtype = call.accumulator if call.wide else call.q.dtype
    back = [order.index(dim) for dim in range(3)]
    return call.q.new_empty(sizes, dtype=dtype).permute(*back, 3)


HOPPER = _provider("hopper", "cuda", "hopper_kernel", _hopper_refuses)
TRITON = _provider("triton", _DEVICE, "triton_kernel", _triton_refuses)
DECODE = _provider("decode", _DEVICE, "decode_kernel", _decode_refuses, folds=False, softcap=True)
