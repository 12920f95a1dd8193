"""Linear attention with a decay, for models to call: captured it is one op."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ops import linear_attention as body
from ringcompile.ops.schemas import op


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal linear attention whose state decays, as in Mamba 2, RetNet and gated variants of them.

        state[t] = exp(decay[t]) * state[t - 1] + outer(k[t], v[t])
        y[t]     = q[t] @ state[t]

    With beta it is the gated delta rule, as in Qwen3-Next and Kimi Linear: in place of v[t], what a
    token takes in is beta[t] * (v[t] - k[t] @ (exp(decay[t]) * state[t - 1])).

    Where a model calls it, ranks that share a sequence exchange one state for each of their chunks
    and a cache keeps states, not all keys. Outside of capture it is plain PyTorch, with gradients.
    It is computed in float32 at least.

    Args:
        q: queries [.., tokens, N].
        k: keys [.., tokens, N].
        v: values [.., tokens, P].
        decay: [.., tokens], the natural logarithm of what a token leaves of the state before it: 0
            keeps all of it, -inf nothing. With as many dims as k it is [.., tokens, N], one for
            each feature of the keys.
        beta: [.., tokens]. Leading dims, such as batch and heads, broadcast.

    Returns:
        [.., tokens, P] in the dtype of v.

    Raises:
        RingCompileError: the sizes do not belong together.
    """
    given = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}
    operands = {name: x for name, x in given.items() if x is not None}
    sizes = {name: tuple(x.shape) for name, x in operands.items()}
    inner = {"q": 2, "k": 2, "v": 2, "decay": 1 + (decay.dim() == k.dim()), "beta": 1}
    text = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if not _belong_together(sizes, inner):
        raise RingCompileError(
            f"linear attention of {text}",
            hint="pass q and k [.., tokens, N], v [.., tokens, P], decay [.., tokens] or "
            "[.., tokens, N], and beta [.., tokens]",
        )
    try:
        outer = torch.broadcast_shapes(*(size[: -inner[name]] for name, size in sizes.items()))
    except RuntimeError:
        raise RingCompileError(
            f"the leading dims of {text} do not broadcast",
            hint="give them the same batch and heads, or size 1",
        ) from None
    whole = [x.expand(*outer, *x.shape[-inner[name] :]) for name, x in operands.items()]
    return (op("linear_attention") if torch.compiler.is_exporting() else body.linear_attention)(
        *whole
    )


def _belong_together(sizes: Mapping[str, tuple[int, ...]], inner: Mapping[str, int]) -> bool:
    """Whether all are of as many tokens, and keys and decays fit queries."""
    if any(len(size) < inner[name] for name, size in sizes.items()):
        return False
    tokens = sizes["q"][-2]
    features = [sizes[name][-1] for name in ("k", "decay") if inner[name] == 2]
    # No set of them: while a model is captured, sizes may be symbols.
    return all(size == sizes["q"][-1] for size in features) and all(
        size[-inner[name]] == tokens for name, size in sizes.items()
    )
