"""Linear attention with a decay, for models to call: captured it is one op."""

from __future__ import annotations

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ops import linear_attention as body
from ringcompile.ops.schemas import op

_Size = tuple[int, ...]


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """Causal linear attention whose state decays, as in Mamba 2, RetNet and gated variants of them.

        state[t] = exp(decay[t]) * state[t - 1] + outer(k[t], v[t])
        y[t]     = q[t] @ state[t]

    Where a model calls it, ranks that share a sequence exchange one state for each of their chunks
    and a cache keeps states, not all keys. Outside of capture it is plain PyTorch, with gradients.
    It is computed in float32 at least.

    Args:
        q: queries [.., tokens, N].
        k: keys [.., tokens, N].
        v: values [.., tokens, P].
        decay: [.., tokens], the natural logarithm of what a token leaves of the state before it: 0
            keeps all of it, -inf nothing. Leading dims, such as batch and heads, broadcast.

    Returns:
        [.., tokens, P] in the dtype of v.

    Raises:
        RingCompileError: the sizes do not belong together.
    """
    sizes = [tuple(x.shape) for x in (q, k, v, decay)]
    if not _belong_together(*sizes):
        raise RingCompileError(
            f"linear attention of q {sizes[0]}, k {sizes[1]}, v {sizes[2]} and decay {sizes[3]}",
            hint="pass q and k [.., tokens, N], v [.., tokens, P] and decay [.., tokens]",
        )
    try:
        outer = torch.broadcast_shapes(*(size[:-2] for size in sizes[:3]), sizes[3][:-1])
    except RuntimeError:
        raise RingCompileError(
            f"the leading dims of q {sizes[0]}, k {sizes[1]}, v {sizes[2]} and decay {sizes[3]} "
            "do not broadcast",
            hint="give them the same batch and heads, or size 1",
        ) from None
    q, k, v = (x.expand(*outer, *x.shape[-2:]) for x in (q, k, v))
    decay = decay.expand(*outer, decay.shape[-1])
    if torch.compiler.is_exporting():
        return op("linear_attention")(q, k, v, decay)
    return body.linear_attention(q, k, v, decay)


def _belong_together(q: _Size, k: _Size, v: _Size, decay: _Size) -> bool:
    """Whether queries, keys, values and decays are of as many tokens, and keys fit queries."""
    if min(map(len, (q, k, v))) < 2 or not decay:
        return False
    # No set of them: while a model is captured, sizes may be symbols.
    return q[-1] == k[-1] and all(other == decay[-1] for other in (q[-2], k[-2], v[-2]))
