"""Capture of Hugging Face's state space layers: as scans, which hold at every length.

Mamba 1 and its kin can go through associative_scan. Mamba 2 and its kin go through chunks of a
fixed size, to a multiple of which they pad the sequence: what they compute is linear attention with
a decay, and captured as such.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from ringcompile.linear_attention import linear_attention

_ANSWERS = {"is_torchdynamo_compiling": lambda: True, "is_torchdynamo_exporting": lambda: False}
# Arguments with which it computes something else.
_OTHERWISE, _RETURNED = ("initial_states", "seq_idx", "cu_seqlens"), "return_final_states"
_CHUNKED = "mamba2_chunk_scan"


@contextlib.contextmanager
def states_by_scan(model: nn.Module) -> Iterator[None]:
    """While inside, state space layers scan, in place of loops over tokens or fixed chunks."""
    with contextlib.ExitStack() as patches:
        for module, name, other in _replaced(model):
            patches.enter_context(mock.patch.object(module, name, other))
        yield


def _replaced(model: nn.Module) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Functions that the files of layers call by name, and what they call while inside.

    Layers that may use associative_scan ask torch whether it compiles, since that needs it;
    captured it is an op of its own.
    """
    scanning = {type(layer) for layer in model.modules()
                if getattr(layer, "use_associative_scan", False)}
    for module in _files(scanning):
        for name in filter(partial(hasattr, module), _ANSWERS):
            yield module, name, _ANSWERS[name]
    for module in _files({type(layer) for layer in model.modules()}):
        original = getattr(module, _CHUNKED, None)
        if original is not None and module.__name__.startswith("transformers."):
            yield module, _CHUNKED, partial(_chunk_scan, original)


def _files(kinds: Collection[type]) -> list[Any]:
    """The Python modules that classes and their bases are written in."""
    names = dict.fromkeys(base.__module__ for kind in kinds for base in kind.__mro__)
    return [sys.modules[name] for name in names]


def _chunk_scan(
    original: Callable[..., Any],
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 - as transformers names its arguments
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    chunk_size: int,
    *,
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> Any:
    """Mamba 2's states, read by each token, as transformers computes them, in float32.

    Args:
        original: the function of transformers, for calls of which this is not what they compute.
        hidden_states: [B,S,H,P].
        dt: [B,S,H], steps.
        A: [H], rates.
        B: [B,S,G,N], what enters for each of G groups of heads.
        C: [B,S,G,N], what is read.
        chunk_size: not needed.
        D: [H], what passes by the state.
        dt_bias: [H].
        dt_softplus: whether steps pass through softplus.
        dt_limit: the smallest and largest step.
        others: a state to start from or to return, packed sequences.
    """
    if any(others.get(name) is not None for name in _OTHERWISE) or others.get(_RETURNED):
        return original(
            hidden_states, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
            dt_limit=dt_limit, **others,
        )
    heads = hidden_states.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, min=dt_limit[0], max=dt_limit[1])
    wide = hidden_states.float()
    entering, read = (
        x.float().repeat_interleave(heads // x.shape[2], dim=2, output_size=heads) for x in (B, C)
    )
    values = wide * dt[..., None].float()
    decay = A.to(wide.dtype) * dt.float()
    q, k, v = (x.transpose(1, 2) for x in (read, entering, values))
    y = linear_attention(q, k, v, decay.transpose(1, 2)).transpose(1, 2).contiguous()
    return y if D is None else y + D[..., None] * wide
