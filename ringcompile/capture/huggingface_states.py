"""Capture of Hugging Face's state space layers: as scans, which hold at every length.

Mamba 1 and its kin can go through associative_scan; RecurrentGemma's loop over tokens is the same
linear recurrence, and RWKV's is two of them. Mamba 2, Qwen3-Next, Kimi Linear and their kin go
through chunks of a fixed size, to a multiple of which they pad the sequence: what they compute is
linear attention with a decay, some by the delta rule, and captured as such. So are the blocks of
MiniMax's lightning attention and the chunks of xLSTM.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from inspect import Parameter, signature
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from ringcompile.linear_attention import linear_attention
from ringcompile.ops.schemas import op


@contextlib.contextmanager
def states_by_scan(model: nn.Module) -> Iterator[None]:
    """While inside, state space layers scan, in place of loops over tokens or fixed chunks."""
    with contextlib.ExitStack() as patches:
        for module, name, other in _replaced(model):
            patches.enter_context(mock.patch.object(module, name, other))
        yield


def _replaced(model: nn.Module) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Functions of the files of layers, or methods of layers, and what is called in their place.

    Layers that may use associative_scan ask torch whether it compiles, since that needs it;
    captured it is an op of its own.
    """
    scanning = {type(layer) for layer in model.modules()
                if getattr(layer, "use_associative_scan", False)}
    for module in _files(scanning):
        for name in filter(partial(hasattr, module), _ANSWERS):
            yield module, name, _ANSWERS[name]
    kinds = {type(layer): layer for layer in model.modules()}
    for kind, layer in kinds.items():
        for mark in filter(partial(hasattr, layer), _METHODS):
            name, replacing = _METHODS[mark]
            if kind.__module__.startswith("transformers."):
                yield kind, name, replacing(getattr(kind, name))
    for module in _files(kinds):
        if module.__name__.startswith("transformers."):
            for name in filter(partial(hasattr, module), _CHUNKED):
                yield module, name, partial(_unless_begun, getattr(module, name), _CHUNKED[name])


def _files(kinds: Collection[type]) -> list[Any]:
    """The Python modules that classes and their bases are written in."""
    names = dict.fromkeys(base.__module__ for kind in kinds for base in kind.__mro__)
    return [sys.modules[name] for name in names]


def _unless_begun(
    original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Ours; the original where it is told what ours does not know, or sequences are packed.

    A state to begin from or to return is such an argument, and so is any that a later version of
    transformers may add.
    """
    parameters, known = signature(original).parameters, signature(function).parameters
    told = {
        name: value for name, value in signature(original).bind(*args, **kwargs).arguments.items()
        if parameters[name].kind is not Parameter.VAR_KEYWORD
    }
    packed = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens"))
    if packed or any(told[name] is not parameters[name].default for name in told.keys() - known):
        return original(*args, **kwargs)
    return function(**{name: told[name] for name in known if name in told})


def _chunk_scan(
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
) -> torch.Tensor:
    """Mamba 2's states, read by each token, as transformers computes them, in float32.

    Args:
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
    """
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, min=dt_limit[0], max=dt_limit[1])
    wide = hidden_states.float()
    entering, read = (_for_heads(x.float(), hidden_states.shape[2]) for x in (B, C))
    values = wide * dt[..., None].float()
    decay = A.to(wide.dtype) * dt.float()
    y = _attended(read, entering, values, decay)
    return y if D is None else y + D[..., None] * wide


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule of Qwen3-Next, and Kimi's, whose features decay apart; in float32.

    Args:
        query: [B,S,G,N], of G groups of heads.
        key: [B,S,G,N].
        value: [B,S,H,P].
        g: [B,S,H] or [B,S,H,N], logarithms of decays.
        beta: [B,S,H].
        chunk_size: not needed.
        use_qk_l2norm_in_kernel: whether queries and keys are normalised.
    """
    q, k = (_for_heads(x.float(), value.shape[2]) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    y = _attended(q * q.shape[-1] ** -0.5, k, value.float(), g.float(), beta.float())
    return y.to(query.dtype), None


def _linear_unit(original: Callable[..., Any]) -> Callable[..., Any]:
    """RecurrentGemma's linear recurrence, which it computes in a loop over tokens.

    Args:
        original: its method, which goes on from a state of its own cache.
    """

    def scanned(
        layer: nn.Module, hidden_states: torch.Tensor, recurrent_gate: torch.Tensor,
        reset: torch.Tensor, recurrent_states: torch.Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> Any:
        if recurrent_states is not None:
            return original(
                layer, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype
            )
        gate = (recurrent_gate * ~reset).to(acc_dtype)
        states = op("recurrence")(gate, hidden_states.to(acc_dtype), dim=1)
        return states.to(hidden_states.dtype), states[:, -1]

    return scanned


def _lightning(original: Callable[..., Any]) -> Callable[..., Any]:
    """MiniMax's lightning attention, each of whose heads forgets at a rate of its own.

    Args:
        original: its forward, which goes through blocks of a fixed size, or on from a cache.
    """

    def attended(
        layer: Any, hidden_states: torch.Tensor, position_embeddings: Any,
        attention_mask: torch.Tensor | None, past_key_values: Any = None, **kwargs: Any,
    ) -> Any:
        if past_key_values is not None:
            return original(layer, hidden_states, position_embeddings, attention_mask,
                            past_key_values=past_key_values, **kwargs)
        x = layer.act_fn(layer.qkv_proj(hidden_states))
        if attention_mask is not None:  # 1 for a token, 0 for padding
            x = (x * attention_mask[:, :, None]).to(x.dtype)
        x = x.unflatten(-1, (layer.num_attention_heads, 3 * layer.head_dim))
        q, k, v = (each.transpose(1, 2) for each in x.split(layer.head_dim, -1))
        decay = -layer.slope_rate[:, 0].expand(q.shape[:-1])
        y = linear_attention(q, k, v, decay).transpose(1, 2).flatten(2)
        y = F.sigmoid(layer.output_gate(hidden_states)) * layer.norm(y)
        return layer.out_proj(y), None

    return attended


def _mlstm(original: Callable[..., Any]) -> Callable[..., Any]:
    """The matrix memory of xLSTM: linear attention whose keys are weighted by an exponential gate.

    Sums are kept beside a logarithm by which they are scaled down, the largest of the gates so far
    less what was forgotten since.

    Args:
        original: its forward, which goes through chunks of fixed sizes, or on from a state.
    """

    def attended(
        layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        igate: torch.Tensor, fgate: torch.Tensor, c_initial: Any = None, n_initial: Any = None,
        m_initial: Any = None, return_last_states: Any = None, mode: str | None = None,
    ) -> Any:
        begun = any(x is not None for x in (c_initial, n_initial, m_initial))
        if begun or "inference" not in (mode or layer.config.mode):
            return original(layer, query, key, value, igate, fgate, c_initial, n_initial,
                            m_initial, return_last_states, mode)
        forgotten, gate = F.logsigmoid(fgate.float()), igate.float()
        since = forgotten.cumsum(-1)
        scale = since + (gate - since).cummax(-1).values.clamp(min=0)
        decay = forgotten + F.pad(scale, (1, -1)) - scale
        k = key.float() * torch.exp(gate - scale)[..., None]
        v = F.pad(value.float(), (0, 1), value=1.0)
        y = linear_attention(query.float() * query.shape[-1] ** -0.5, k, v, decay)
        weight = torch.maximum(y[..., -1].abs(), torch.exp(-scale)) + layer.config.eps
        return (y[..., :-1] / weight[..., None]).to(query.dtype), None

    return attended


def _wkv(
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """RWKV's average of values, weighted by exp(key), which fade with each later token; in float32.

    Both sums are kept beside a logarithm by which they are scaled down, here that of the sum of all
    weights so far: any would do that is about as large. What it is rounded by cancels out, since
    what scales a sum down at one token scales it up again at the next one.

    Args:
        time_decay: [C], logarithms of the rates at which weights fade.
        time_first: [C], what a token's own key is raised by.
        key: [B,S,C].
        value: [B,S,C].
    """
    k, v, fading = key.float(), value.float(), -torch.exp(time_decay.float())
    faded = torch.arange(k.shape[1], device=k.device).to(k.dtype)[:, None] * fading
    scale = torch.logcumsumexp(k - faded, 1) + faded
    before = F.pad(scale, (0, 0, 1, -1), value=_NOTHING)
    gate, entering = torch.exp(fading + before - scale), torch.exp(k - scale)
    sums = [op("recurrence")(gate, x, dim=1) for x in (entering * v, entering)]
    above, below = (F.pad(x, (0, 0, 1, -1)) for x in sums)
    largest = torch.maximum(before, k + time_first)
    left, own = torch.exp(before - largest), torch.exp(k + time_first - largest)
    return ((left * above + own * v) / (left * below + own)).to(key.dtype), None


def _for_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B,S,G,N] as [B,S,H,N]: heads of a group share it."""
    groups = x.shape[2]
    return x if heads == groups else x.repeat_interleave(
        heads // groups, dim=2, output_size=heads
    )


def _attended(*operands: torch.Tensor) -> torch.Tensor:
    """Linear attention of [B,S,H,..], whose heads transformers has behind the tokens."""
    return linear_attention(*(x.transpose(1, 2) for x in operands)).transpose(1, 2).contiguous()


# What layers ask torch, and what they are told.
_ANSWERS = {"is_torchdynamo_compiling": lambda: True, "is_torchdynamo_exporting": lambda: False}
# By what a layer has, a method that goes through the tokens in a loop or in blocks, and what makes
# another of it.
_METHODS: dict[str, tuple[str, Callable[..., Any]]] = {
    "_rnn_scan": ("_rnn_scan", _linear_unit),
    "get_slope_rate": ("forward", _lightning),
    "chunkwise_kernel_fn": ("forward", _mlstm),
}
# The logarithm of what there is before the first token.
_NOTHING = -1e30
# Functions that go through chunks of a fixed size, and what they compute.
_CHUNKED: dict[str, Callable[..., Any]] = {
    "mamba2_chunk_scan": _chunk_scan,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "rwkv_linear_attention": _wkv,
}
