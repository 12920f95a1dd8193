"""Attention of the optional package ffpa-attn, for head dims above 256 on any GPU it knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ringcompile.ops.kernels.contract import (
    BlockCall,
    Provider,
    masked,
    not_half,
    older_gpu,
    two_head_dims,
    unaligned,
)

_HEAD_DIMS = range(257, 1025)


@lru_cache
def _op() -> Callable[..., Any] | str:
    """The package's forward op over Triton, which returns the LSE; or why it is not there."""
    try:
        import_module("ffpa_attn")
        return torch.ops.ffpa_attn._fwd_triton
    except (ImportError, AttributeError) as error:
        return f"this Python has no fitting ffpa-attn: {error}"


def _run(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Groups heads itself; LSE padded to 128 rows."""
    op = _op()
    assert callable(op)
    out, lse = op(
        call.q, call.k, call.v, None, call.scale, int(call.causal),
        0, 0,  # no autotuning: that would be a search at run time
        0.0, 0, 0,  # no dropout
        1, 0,  # by the copy engine where there is one; warps not specialised
    )
    return out, lse[..., : call.q.shape[2]].contiguous()


def _refuses(call: BlockCall) -> str | None:
    if call.q.shape[3] not in _HEAD_DIMS:
        return (
            f"head_dim is {call.q.shape[3]}, it takes {_HEAD_DIMS.start} to {_HEAD_DIMS.stop - 1}"
        )
    found = _op()
    return (
        masked(call)
        or not_half(call)
        or two_head_dims(call)
        or older_gpu(call, (8, 0))
        or _strided(call)
        or unaligned(call)
        or (found if isinstance(found, str) else None)
    )


def _strided(call: BlockCall) -> str | None:
    # Seen with ffpa-attn 0.2.4 on an H200: wrong LSE and output, without a word.
    if all(x.is_contiguous() for x in (call.q, call.k, call.v)):
        return None
    return "tensors are strided, and it misreads some that are"


FFPA = Provider("ffpa", "cuda", _refuses, _run)
