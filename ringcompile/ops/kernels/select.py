"""The entries of the kernels: checks, the choice of a kernel, and what is the same for all."""

from __future__ import annotations

import math

from torch import Tensor

from ringcompile.errors import RingCompileError
from ringcompile.ops.kernels.contract import BlockCall, Provider, check_call
from ringcompile.ops.kernels.cpu import CPU_FLASH
from ringcompile.ops.kernels.cuda import CUDA_CUDNN, CUDA_EFFICIENT, CUDA_FLASH
from ringcompile.ops.kernels.custom import DECODE, HOPPER, TRITON
from ringcompile.ops.kernels.ffpa import FFPA
from ringcompile.ops.kernels.merging import check_accumulator, merge
from ringcompile.ops.kernels.plain import MATH

# The first that fits is taken, so faster ones stand first; `math` fits whatever attend admits.
# cuDNN stands behind the kernel that takes all it takes: it has to be asked for. For few queries
# `decode` reads each key once, which the kernels behind it do not.
_PROVIDERS = [
    CUDA_FLASH, DECODE, HOPPER, TRITON, FFPA, CUDA_CUDNN, CUDA_EFFICIENT, CPU_FLASH, MATH,
]
# Those that are made of torch's operators.
_OF_TORCH = (CPU_FLASH, MATH)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
    provider: str | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of a block of queries over a block of keys.

    Args:
        q: [B,H,Sq,D]; fp32, fp16, bf16 or fp64.
        k: [B,G,Sk,D] of q's dtype, G dividing H: query head h reads KV head h // (H // G).
        v: [B,G,Sk,E]. All three may be strided views; kernels other than `math` want the last dim
            contiguous.
        scale: what scores are multiplied by before the softmax.
        causal: query i sees the keys j <= i only; needs Sq == Sk.
        mask: broadcastable to [B,H,Sq,Sk]; bool (True is visible) or additive. Adds to `causal`.
        softcap: a positive bound c that scores x are bent to before they are masked, as
            c * tanh(x / c) (Gemma 2, 2024); only `math` takes it.
        provider: a name from `providers()`; by default the first one that fits.
        wide: whether out is wanted in the dtype that blocks are merged in.

    Returns:
        out [B,H,Sq,E] in q's dtype (float32 where it is wide; float64 for float64) and the
        natural-log LSE [B,H,Sq], contiguous, in float32 (float64 for float64). Both are new memory
        that the caller may update in place. Rows that see no key have out 0 and LSE -inf; with
        Sk == 0 that is every row.

    Raises:
        RingCompileError: the inputs disagree, or the named provider does not fit them.
    """
    call = _checked(q, k, v, scale, causal, mask, softcap, wide)
    chosen = _select(provider, call)
    dtype = call.accumulator if wide else q.dtype
    if 0 in call.scores:
        # The CPU flash op dies of a division by zero (SIGFPE) on an empty dim.
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype)
        return out, q.new_full(q.shape[:3], -math.inf, dtype=call.accumulator)
    out, lse = chosen.run(call)
    return out.to(dtype), lse


def attend_merge(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
    provider: str | None = None,
) -> None:
    """Attention over one more block of keys, folded into an accumulator in place.

    The same as `merge(out, lse, *attend(q, k, v, ...))`, in one launch where the kernel can.

    Args:
        out: [B,H,Sq,E], float32 (float64 for float64); may be a view of a larger accumulator.
        lse: [B,H,Sq], likewise.
        q: as for `attend`, and so are the rest.
        k: see `attend`.
        v: see `attend`.
        scale: see `attend`.
        causal: see `attend`.
        mask: see `attend`.
        softcap: see `attend`.
        provider: see `attend`.

    Raises:
        RingCompileError: the inputs disagree, or the named provider does not fit them.
    """
    call = _checked(q, k, v, scale, causal, mask, softcap, wide=False)
    check_accumulator(out, lse, (*q.shape[:3], v.shape[3]), call.accumulator)
    chosen = _select(provider, call)
    if 0 in call.scores:
        return
    if chosen.fold is not None and out.stride(3) == 1:
        chosen.fold(call, out, lse)
    else:
        merge(out, lse, *chosen.run(call))


def providers() -> tuple[str, ...]:
    """The names `attend` takes as `provider`, in the order in which it tries them."""
    return tuple(provider.name for provider in _PROVIDERS)


def unseen() -> str | None:
    """A kernel that runs on CPUs and is perhaps not made of torch's operators; None without one."""
    return next((p.name for p in _PROVIDERS if p.device != "cuda" and p not in _OF_TORCH), None)


def put_first(provider: Provider) -> None:
    """Have a kernel tried before all others.

    Raises:
        RingCompileError: there is one of that name.
    """
    if provider.name in providers():
        raise RingCompileError(f"there is an attention provider named {provider.name!r} already")
    _PROVIDERS.insert(0, provider)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    softcap: float | None,
    wide: bool,
) -> BlockCall:
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    call = BlockCall(q, k, v, scale, causal, mask, softcap, wide)
    check_call(call)
    return call


def _select(name: str | None, call: BlockCall) -> Provider:
    if name is None:
        here = (None, call.q.device.type)
        return next(p for p in _PROVIDERS if p.device in here and p.refusal(call) is None)
    chosen = next((provider for provider in _PROVIDERS if provider.name == name), None)
    if chosen is None:
        raise RingCompileError(
            f"no attention provider is named {name!r}", hint=f"one of {', '.join(providers())}"
        )
    if reason := chosen.refusal(call):
        raise RingCompileError(
            f"attention provider {name!r} does not fit: {reason}",
            hint="leave the provider out, and the first one that fits is taken",
        )
    return chosen
