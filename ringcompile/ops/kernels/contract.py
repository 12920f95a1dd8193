"""What a kernel is given, what it may refuse, and what all of them refuse alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ringcompile.errors import RingCompileError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
_BYTES_PER_LOAD = 16  # CUDA kernels load 128 bits at a time


@dataclass(frozen=True)
class BlockCall:
    """The arguments of `attend`, the mask in 4 dims.

    Attributes:
        wide: whether the output is wanted in the accumulator's dtype.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    mask: Tensor | None
    softcap: float | None
    wide: bool = False

    @property
    def scores(self) -> tuple[int, ...]:
        """Shape of the scores: B, H, Sq, Sk."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def accumulator(self) -> torch.dtype:
        """What blocks are merged in: float32, and float64 for float64."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Provider:
    """One kernel.

    Attributes:
        name: what `attend` calls it by.
        device: the device it runs on; None for any.
        refuses: the reason why it does not take a call, or None.
        run: out in q's dtype or a wider one, and LSE.
        softcap: whether it bends scores.
        fold: merges the block into out [B,H,Sq,E] and LSE [B,H,Sq], both float32, in one launch;
            None where `run` and `merge` have to do it.
    """

    name: str
    device: str | None
    refuses: Callable[[BlockCall], str | None]
    run: Callable[[BlockCall], tuple[Tensor, Tensor]]
    softcap: bool = False
    fold: Callable[[BlockCall, Tensor, Tensor], None] | None = None

    def refusal(self, call: BlockCall) -> str | None:
        """Why this kernel does not take the call, or None."""
        device = call.q.device.type
        if self.device not in (None, device):
            return f"tensors are on {device}, it runs on {self.device}"
        if call.softcap is not None and not self.softcap:
            return "it takes no soft cap"
        return self.refuses(call)


def check_call(call: BlockCall) -> None:
    """Raise RingCompileError for what no kernel takes."""
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


# -- masks, as kernels take them -----------------------------------------------------------------


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -math.inf)


def blind_rows(bias: Tensor, call: BlockCall) -> Tensor:
    """Rows that see no key: bool, broadcastable to [B,H,Sq], from the mask in additive form."""
    visible = bias != -math.inf
    if call.causal:
        visible = visible.expand(-1, -1, *call.scores[2:]).tril()
    return ~visible.any(-1)


# -- reasons for refusals that kernels share -----------------------------------------------------


def masked(call: BlockCall) -> str | None:
    """A mask, for a kernel that takes none."""
    return None if call.mask is None else "it takes no mask"


def not_half(call: BlockCall) -> str | None:
    """Another dtype than the two that matrix units multiply."""
    if call.q.dtype in HALVES:
        return None
    return f"dtype is {call.q.dtype}, it takes float16 and bfloat16"


def older_gpu(call: BlockCall, capability: tuple[int, int]) -> str | None:
    """A GPU without the instructions that the kernel is made of."""
    if torch.cuda.get_device_capability(call.q.device) >= capability:
        return None
    return f"the GPU is older than compute capability {capability[0]}.{capability[1]}"


def two_head_dims(call: BlockCall) -> str | None:
    """Values of another width than queries and keys."""
    if call.q.shape[3] == call.v.shape[3]:
        return None
    return f"head_dim of q and k is {call.q.shape[3]}, of v {call.v.shape[3]}, it takes one size"


def strided_last_dim(call: BlockCall) -> str | None:
    """Numbers of a row that do not lie side by side."""
    # The CPU flash op reads such a tensor as if it were contiguous, without a word.
    if all(x.stride(3) == 1 or x.shape[3] == 1 for x in (call.q, call.k, call.v)):
        return None
    return "the last dim is strided"


def unaligned(call: BlockCall) -> str | None:
    """Rows that a 128-bit load cannot begin with."""
    for x in (call.q, call.k, call.v):
        num_elements = _BYTES_PER_LOAD // x.element_size()
        if any(n % num_elements for n in (x.storage_offset(), x.shape[3], *x.stride()[:3])):
            return f"rows are not aligned to {_BYTES_PER_LOAD} bytes"
    return None
