"""Linear attention with a decay: what state space models and gated linear attention compute.

A state [N,P] decays with each token and takes in the outer product of its key and value:

    state[t] = exp(decay[t]) * state[t - 1] + outer(k[t], v[t])
    y[t]     = q[t] @ state[t]

Within a block of tokens this is attention without a softmax, whose scores decay; from block to
block a state goes on (Dao and Gu, "Transformers are SSMs", section 6). How much is left of a token
is computed from the sum of the decays between the two, never as a difference of longer sums: it
neither overflows nor cancels out, however strongly tokens forget. A decay of -inf forgets all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Tokens that see each other directly.
BLOCK = 64


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each token reads of the state, its own key and value included.

    Args:
        q: [..,S,N].
        k: [..,S,N].
        v: [..,S,P].
        decay: [..,S], the logarithm of what a token leaves of the state before it.
        state: [..,N,P] in front of the first token; None is 0.

    Returns:
        [..,S,P], in the dtype of v; computed in float32 or more.
    """
    size = v.shape[-2]
    blocks = Blocks(k, v, decay, BLOCK)
    y = blocks.within(q)
    if size > BLOCK or state is not None:
        y = y + blocks.before(q, blocks.states(state))
    return y.flatten(-3, -2).narrow(-2, 0, size).to(v.dtype)


def linear_state(k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The state [..,N,P] behind the last token, from 0 in front of the first; float32 or more.

    Args:
        k: [..,S,N].
        v: [..,S,P].
        decay: [..,S].
    """
    return Blocks(k, v, decay, BLOCK).states(None)[..., -1, :, :]


class Blocks:
    """Keys, values and decays in C blocks of L tokens.

    Args:
        k: [..,S,N].
        v: [..,S,P].
        decay: [..,S].
        block: the most tokens of a block.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, block: int
    ) -> None:
        self.length = min(block, v.shape[-2])
        self.k, self.v = self._opened(k), self._opened(v)
        self.decay = self._opened(decay.unsqueeze(-1)).squeeze(-1)
        self.left = _left(self.decay)  # [..,C,L,L]

    def _opened(self, x: torch.Tensor) -> torch.Tensor:
        """[..,S,D] as [..,C,L,D], with zeros behind the last token."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        missing = -x.shape[-2] % self.length
        return F.pad(wide, [0, 0, 0, missing]).unflatten(-2, (-1, self.length))

    def within(self, q: torch.Tensor) -> torch.Tensor:
        """What tokens read of those of their own block, [..,C,L,P]."""
        return ((self._opened(q) @ self.k.mT) * self.left) @ self.v

    def before(self, q: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What tokens read of the state in front of their block, [..,C,L,P].

        Args:
            q: [..,S,N].
            states: as `states` gives them.
        """
        faded = self._opened(q) * self.decay.cumsum(-1).exp().unsqueeze(-1)
        return faded @ states[..., :-1, :, :]

    def states(self, first: torch.Tensor | None) -> torch.Tensor:
        """The states in front of all blocks and behind the last, [..,C+1,N,P].

        Args:
            first: [..,N,P], in front of the first block; None is 0.
        """
        own = (self.k * self.left[..., -1, :].unsqueeze(-1)).mT @ self.v
        entering = torch.zeros_like(own[..., 0, :, :]) if first is None else first.to(own.dtype)
        terms = torch.cat([entering.unsqueeze(-3), own], -3).flatten(-2)
        # The same again: each block leaves some of what is before it, and adds its own.
        each = terms.new_ones((*terms.shape[:-1], 1))
        decay = F.pad(self.decay.sum(-1), [1, 0])
        return linear_attention(each, each, terms, decay).unflatten(-1, own.shape[-2:])


def _left(decay: torch.Tensor) -> torch.Tensor:
    """How much is left of entry j at entry i, [..,L,L]: exp of the decays behind j up to i."""
    size = decay.shape[-1]
    ones = torch.ones((size, size), dtype=torch.bool, device=decay.device)
    each = decay.unsqueeze(-1).expand(*decay.shape, size)
    sums = each.masked_fill(ones.triu(), 0.0).cumsum(-2)
    return sums.exp().masked_fill(ones.triu(1), 0.0)
