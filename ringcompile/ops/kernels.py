"""Block-attention kernels behind one contract, and the merge of their results.

Every kernel returns the attention of its block and the log-sum-exp (LSE) of its scores, from which
blocks merge into the attention over all keys. What a kernel takes, and where its LSE departs from
the contract, is told beside it; `attend` picks the first row of the table that fits. Forward only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ringcompile.errors import RingCompileError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BYTES_PER_LOAD = 16  # CUDA kernels load 128 bits at a time
_NUM_MERGE_ROWS = 256


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

    Returns:
        out [B,H,Sq,E] in q's dtype and the natural-log LSE [B,H,Sq], contiguous, in float32
        (float64 for float64). Both are new memory that the caller may update in place. Rows that
        see no key have out 0 and LSE -inf; with Sk == 0 that is every row.

    Raises:
        RingCompileError: the inputs disagree, or the named provider does not fit them.
    """
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    call = _Call(q, k, v, scale, causal, mask, softcap)
    _check_call(call)
    chosen = _select(provider, call)
    if 0 in call.scores:
        # The CPU flash op dies of a division by zero (SIGFPE) on an empty dim.
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        return out, q.new_full(q.shape[:3], -math.inf, dtype=call.accumulator)
    return chosen.run(call)


def merge(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Fold the result of one more block of keys into an accumulator, in place.

        lse' = log(exp(lse) + exp(lse_b));  out' = out + sigmoid(lse_b - lse) * (out_b - out)

    which is the online softmax of FlashAttention (Dao et al., 2022) over whole blocks. A side
    whose LSE is -inf (and out 0) has no weight.

    Args:
        out: [..., S, E], float32 or float64; may be a view of a larger accumulator, as may lse.
        lse: [..., S] in out's dtype.
        out_b: [..., S, E] of the block, in out's dtype or a narrower one.
        lse_b: [..., S] of the block, likewise.

    Raises:
        RingCompileError: shapes differ, or a dtype would lose precision in the merge.
    """
    _check_states(out, lse, out_b, lse_b)
    lse_b = lse_b.to(lse.dtype)
    # Where lse_b is -inf the weight is 0; set, because -inf - -inf is NaN. A NaN of lse_b stays.
    weight = torch.sigmoid(lse_b - lse).masked_fill_(lse_b.isneginf(), 0.0).unsqueeze(-1)
    if out_b.dtype == out.dtype:
        out.lerp_(out_b, weight)
    else:
        # A few rows at a time: all of out_b at once would be widened into newly mapped memory,
        # which costs several times the merge. A GPU's allocator keeps its memory: one launch.
        num_rows = _NUM_MERGE_ROWS if out.is_cpu else max(out.shape[-2], 1)
        for start in range(0, out.shape[-2], num_rows):
            rows = slice(start, start + num_rows)
            out[..., rows, :].lerp_(out_b[..., rows, :].to(out.dtype), weight[..., rows, :])
    torch.logaddexp(lse, lse_b, out=lse)


def providers() -> tuple[str, ...]:
    """The names `attend` takes as `provider`, in the order in which it tries them."""
    return tuple(provider.name for provider in _PROVIDERS)


@dataclass(frozen=True)
class _Call:
    """The arguments of `attend`, the mask in 4 dims."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    mask: Tensor | None
    softcap: float | None

    @property
    def scores(self) -> tuple[int, ...]:
        """Shape of the scores: B, H, Sq, Sk."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Provider:
    """One kernel: the device it runs on, what it refuses (with a reason), and its body."""

    name: str
    device: str | None
    refuses: Callable[[_Call], str | None]
    run: Callable[[_Call], tuple[Tensor, Tensor]]
    softcap: bool = False

    def refusal(self, call: _Call) -> str | None:
        device = call.q.device.type
        if self.device not in (None, device):
            return f"tensors are on {device}, it runs on {self.device}"
        if call.softcap is not None and not self.softcap:
            return "it takes no soft cap"
        return self.refuses(call)


def _select(name: str | None, call: _Call) -> _Provider:
    if name is None:
        return next(provider for provider in _PROVIDERS if provider.refusal(call) is None)
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


def _check_call(call: _Call) -> None:
    q, k, v = call.q, call.k, call.v
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise RingCompileError(f"attention takes 4-dim tensors [B,H,S,D], got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise RingCompileError(f"attention inputs disagree: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RingCompileError(f"KV heads do not divide query heads: {shapes}")
    if call.causal and q.shape[2] != k.shape[2]:
        raise RingCompileError(
            f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}",
            hint="pass what each query sees as a mask",
        )
    if q.dtype not in _FLOATS or not q.dtype == k.dtype == v.dtype:
        raise RingCompileError(
            f"attention takes q, k, v of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if call.softcap is not None and not 0 < call.softcap < math.inf:
        raise RingCompileError(f"a soft cap is a positive number, got {call.softcap}")
    if call.mask is not None:
        _check_mask(call.mask, call.scores)


def _check_mask(mask: Tensor, scores: tuple[int, ...]) -> None:
    sizes = zip(mask.shape, scores, strict=False)
    if mask.dim() != 4 or any(size not in (1, full) for size, full in sizes):
        raise RingCompileError(
            f"mask {list(mask.shape)} does not broadcast to the scores {list(scores)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RingCompileError(
            f"mask has dtype {mask.dtype}", hint="bool (True is visible) or float (added to scores)"
        )


def _check_states(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    if out.shape != out_b.shape or lse.shape != lse_b.shape or out.shape[:-1] != lse.shape:
        raise RingCompileError(
            f"states to merge differ: out {list(out.shape)} and {list(out_b.shape)}, "
            f"lse {list(lse.shape)} and {list(lse_b.shape)}"
        )
    wide = out.dtype in (torch.float32, torch.float64) and lse.dtype == out.dtype
    blocks = (out_b.dtype, lse_b.dtype)
    if not wide or any(torch.promote_types(dtype, out.dtype) != out.dtype for dtype in blocks):
        raise RingCompileError(
            f"merge would lose precision: out {out.dtype}, lse {lse.dtype}, "
            f"block out {out_b.dtype}, block lse {lse_b.dtype}",
            hint="accumulate in float32, or float64 for float64",
        )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)


def _blind_rows(bias: Tensor, call: _Call) -> Tensor:
    """Rows that see no key: bool, broadcastable to [B,H,Sq], from the mask in additive form."""
    visible = bias != -math.inf
    if call.causal:
        visible = visible.expand(-1, -1, *call.scores[2:]).tril()
    return ~visible.any(-1)


def _math(call: _Call) -> tuple[Tensor, Tensor]:
    """Plain torch in float32 or float64. Holds all B x H x Sq x Sk scores in memory, twice."""
    q, k, v = (x.to(call.accumulator) for x in (call.q, call.k, call.v))
    # The rows of a query group go through one matmul with their KV head, which is not repeated.
    grouped = q.reshape(*k.shape[:2], -1, q.shape[3])
    scores = (grouped @ k.mT).view(call.scores).mul_(call.scale)
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.mask is not None:
        scores += _additive(call.mask, scores.dtype)
    if call.causal:
        visible = torch.ones(call.scores[2:], dtype=torch.bool, device=q.device).tril()
        scores.masked_fill_(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    # softmax, not exp(scores - lse): where an additive mask hides a whole row by the dtype's
    # lowest number, lse has no digits left for the number of keys.
    weights = scores.softmax(-1).masked_fill_(lse.isneginf().unsqueeze(-1), 0.0)
    out = weights.view(*grouped.shape[:3], k.shape[2]) @ v
    return out.view(*q.shape[:3], v.shape[3]).to(call.q.dtype), lse


def _cpu_flash(call: _Call) -> tuple[Tensor, Tensor]:
    """Flash attention of aten for CPUs: groups heads itself; LSE strided, and 0 in blind rows."""
    # float32 even for halves, which the op allows; a wider one it would misread without a word.
    bias = None if call.mask is None else _additive(call.mask, call.accumulator)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    lse = lse.contiguous()
    if bias is not None:
        lse.masked_fill_(_blind_rows(bias, call), -math.inf)
    return out, lse


def _cpu_flash_refuses(call: _Call) -> str | None:
    return _two_head_dims(call) or _strided_last_dim(call)


def _cuda_flash(call: _Call) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 of aten: groups heads itself, LSE as in the contract."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, 0.0, call.causal, False, scale=call.scale
    )[:2]
    return out, lse.contiguous()


def _cuda_flash_refuses(call: _Call) -> str | None:
    if call.mask is not None:
        return "it takes no mask"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {call.q.dtype}, it takes float16 and bfloat16"
    if call.q.shape[3] > 256:
        return f"head_dim is {call.q.shape[3]}, it takes up to 256"
    if torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return _two_head_dims(call) or _strided_last_dim(call) or _unaligned(call)


def _cuda_efficient(call: _Call) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention of aten: KV heads repeated, LSE padded to 32 rows."""
    q, group_size = call.q, call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(group_size, 1) if group_size > 1 else x for x in (call.k, call.v))
    mask = bias = None
    if call.mask is not None:
        mask = _additive(call.mask, q.dtype)
        # The kernel counts in base 2: times log2(e), the lowest numbers would become -inf there.
        rows = mask.clamp(min=max(torch.finfo(q.dtype).min, -1e38))
        rows.masked_fill_(mask == -math.inf, -math.inf)
        # Its alignment: rows are contiguous and start at multiples of 16 elements.
        num_keys = call.scores[3]
        rows = F.pad(rows.expand(-1, -1, -1, num_keys).contiguous(), (0, -num_keys % 16))
        bias = rows[..., :num_keys].expand(call.scores)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, call.causal, scale=call.scale
    )[:2]
    lse = lse[..., : q.shape[2]].contiguous()
    if mask is not None:
        blind = _blind_rows(mask, call)
        out.masked_fill_(blind.unsqueeze(-1), 0.0)
        lse.masked_fill_(blind, -math.inf)
    return out, lse


def _cuda_efficient_refuses(call: _Call) -> str | None:
    if call.q.dtype == torch.float64:
        return "dtype is torch.float64"
    if call.mask is not None and call.mask.dtype not in (torch.bool, call.q.dtype):
        # The kernel adds a bias of q's dtype: rounding a mask to that would change it silently.
        return f"the additive mask is {call.mask.dtype}, it takes {call.q.dtype} as in q"
    return _strided_last_dim(call) or _unaligned(call)


def _two_head_dims(call: _Call) -> str | None:
    if call.q.shape[3] == call.v.shape[3]:
        return None
    return f"head_dim of q and k is {call.q.shape[3]}, of v {call.v.shape[3]}, it takes one size"


def _strided_last_dim(call: _Call) -> str | None:
    # The CPU flash op reads such a tensor as if it were contiguous, without a word.
    if all(x.stride(3) == 1 or x.shape[3] == 1 for x in (call.q, call.k, call.v)):
        return None
    return "the last dim is strided"


def _unaligned(call: _Call) -> str | None:
    for x in (call.q, call.k, call.v):
        num_elements = _BYTES_PER_LOAD // x.element_size()
        if any(n % num_elements for n in (x.storage_offset(), x.shape[3], *x.stride()[:3])):
            return f"rows are not aligned to {_BYTES_PER_LOAD} bytes"
    return None


# The first that fits is taken, so faster ones stand first; `math` fits whatever attend admits.
_PROVIDERS = (
    _Provider("cuda-flash", "cuda", _cuda_flash_refuses, _cuda_flash),
    _Provider("cuda-efficient", "cuda", _cuda_efficient_refuses, _cuda_efficient),
    _Provider("cpu-flash", "cpu", _cpu_flash_refuses, _cpu_flash),
    _Provider("math", None, lambda call: None, _math, softcap=True),
)
