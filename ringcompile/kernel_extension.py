"""Attention kernels of a user's own: tried before ours, and held to the contract first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ringcompile.errors import RingCompileError
from ringcompile.ops.kernels.contract import BlockCall, Provider
from ringcompile.ops.kernels.plain import MATH
from ringcompile.ops.kernels.select import put_first

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_DEVICES = ("cpu", "cuda")


def register_kernel(
    name: str,
    run: Callable[[BlockCall], tuple[Tensor, Tensor]],
    *,
    refuses: Callable[[BlockCall], str | None],
    device: str = "cpu",
    softcap: bool = False,
) -> None:
    """Register a kernel of your own for attention over one block of keys.

    It is used before all other kernels, for every call that it does not refuse. First its results
    on small calls are compared with plain PyTorch ops: causal or not, with masks that hide whole
    rows, with grouped heads, in each dtype, except for calls that it refuses.

    Args:
        name: what error messages and `ops.kernels.select.attend(provider=...)` call it.
        run: from a `BlockCall` (q [B,H,Sq,D], k [B,G,Sk,D], v [B,G,Sk,E], scale, causal, mask,
            softcap) to out [B,H,Sq,E] in q's dtype and the natural-log LSE [B,H,Sq], contiguous, in
            float32 (float64 for float64). A row that sees no key has out 0 and LSE -inf.
        refuses: the reason why it does not take a call, or None.
        device: "cpu" or "cuda".
        softcap: whether it takes calls with a soft cap.

    Raises:
        RingCompileError: the name is taken, the device is not there to try the kernel on, it
            refuses every call that is tried, or its result differs from that of plain PyTorch ops.
    """
    if device not in _DEVICES:
        raise RingCompileError(f"unknown device '{device}'", hint=f"one of: {', '.join(_DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RingCompileError(f"kernel '{name}' is for cuda, and there is no GPU to try it on")
    provider = Provider(name, device, refuses, run, softcap)
    taken = [call for call in _calls(device) if provider.refusal(call) is None]
    if not taken:
        raise RingCompileError(f"kernel '{name}' refuses every call that it is tried on")
    for call in taken:
        _compare(provider, call)
    put_first(provider)


def _compare(provider: Provider, call: BlockCall) -> None:
    got, want = provider.run(call), MATH.run(call)
    allowed = _CLOSE[call.q.dtype]
    for what, x, y in zip(("output", "LSE"), got, want, strict=True):
        if x.shape != y.shape or not torch.allclose(
            x.to(y.dtype), y, rtol=allowed, atol=allowed, equal_nan=False
        ):
            raise RingCompileError(
                f"kernel '{provider.name}' gives another {what} than plain arithmetic for "
                f"{_described(call)}",
                hint="refuse such calls, or see the contract in `register_kernel`",
            )
    if got[1].dtype != call.accumulator or not got[1].is_contiguous():
        raise RingCompileError(
            f"kernel '{provider.name}' returns LSE as {got[1].dtype}, "
            f"{'contiguous' if got[1].is_contiguous() else 'strided'}: it has to be contiguous "
            f"and {call.accumulator}"
        )


def _calls(device: str) -> Iterator[BlockCall]:
    generator = torch.Generator().manual_seed(0)
    for dtype in _CLOSE:
        for heads, groups, rows, keys, dim in ((2, 2, 16, 16, 64), (4, 2, 8, 24, 32)):
            q, k, v = (
                torch.randn(2, h, n, dim, generator=generator).to(device, dtype)
                for h, n in ((heads, rows), (groups, keys), (groups, keys))
            )
            holes = torch.rand(2, 1, rows, keys, generator=generator) < 0.5
            holes[:, :, 0] = False  # a row that sees no key
            for mask in (None, holes.to(device)):
                for cap in (None, 5.0):
                    causal = rows == keys and mask is None
                    yield BlockCall(q, k, v, dim**-0.5, causal, mask, cap)
                    yield BlockCall(q, k, v, dim**-0.5, False, mask, cap)


def _described(call: BlockCall) -> str:
    parts = [f"q {list(call.q.shape)} x k {list(call.k.shape)} {call.q.dtype}"]
    parts += ["causal"] * call.causal + ["a mask"] * (call.mask is not None)
    parts += ["a soft cap"] * (call.softcap is not None)
    return ", ".join(parts)
