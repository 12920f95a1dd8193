"""Linear attention with a decay: what state space models, gated and delta attention compute.

A state [N,P] decays with each token and takes in the outer product of its key and value:

    state[t] = exp(decay[t]) * state[t - 1] + outer(k[t], v[t])
    y[t]     = q[t] @ state[t]

By the delta rule a token takes in how far its value is from what the decayed state has for its key,
times beta: outer(k[t], beta[t] * (v[t] - k[t] @ (exp(decay[t]) * state[t - 1]))).

Within a block of tokens this is attention without a softmax, whose scores decay; from block to
block a state goes on (Dao and Gu, "Transformers are SSMs", section 6; Yang and others, "Gated Delta
Networks", section 3.3). How much is left of a token is computed from the sum of the decays between
the two, never as a difference of longer sums: it neither overflows nor cancels out, however
strongly tokens forget. A decay of -inf forgets all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Tokens that see each other directly; fewer where each of N features has a decay of its own.
BLOCK, FEW = 64, 16


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each token reads of the state, its own key and value included.

    Args:
        q: [..,S,N].
        k: [..,S,N].
        v: [..,S,P].
        decay: [..,S] or [..,S,N], the logarithm of what a token leaves of the state before it.
        beta: [..,S], for the delta rule.
        state: [..,N,P] in front of the first token; None is 0.

    Returns:
        [..,S,P], in the dtype of v; computed in float32 or more.
    """
    size, block = v.shape[-2], block_of(k, decay)
    blocks = Blocks(k, v, decay, beta, block)
    alone = size <= block and state is None
    y = blocks.read(q, None if alone else blocks.states(state))
    return y.flatten(-3, -2).narrow(-2, 0, size).to(v.dtype)


def linear_state(
    k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor | None = None
) -> torch.Tensor:
    """What tokens do to a state, in float32 or more.

    Args:
        k: [..,S,N].
        v: [..,S,P].
        decay: [..,S] or [..,S,N].
        beta: [..,S], for the delta rule.

    Returns:
        the state [..,N,P] behind the last token, from 0 in front of the first. By the delta rule
        [..,N,N+P]: the matrix that a state in front is multiplied by, and the state from 0.
    """
    if beta is None:
        return Blocks(k, v, decay, None, block_of(k, decay)).states(None)[..., -1, :, :]
    blocks = Blocks(k, torch.cat([torch.zeros_like(k), v], -1), decay, beta, block_of(k, decay))
    size, features = k.shape[-1], v.shape[-1]
    first = torch.eye(size, size + features, dtype=blocks.v.dtype, device=v.device)
    return blocks.states(first.expand(*k.shape[:-2], -1, -1))[..., -1, :, :]


def chained_states(totals: torch.Tensor) -> torch.Tensor:
    """The states [..,C,N,P] behind each of C runs of tokens, from 0.

    Args:
        totals: [..,C,N,N+P], what `linear_state` says of each run by the delta rule.
    """
    size = totals.shape[-2]
    states = [totals[..., 0, :, size:]]
    for total in totals.unbind(-3)[1:]:
        states.append(total[..., :size] @ states[-1] + total[..., size:])
    return torch.stack(states, -3)


def block_of(k: torch.Tensor, decay: torch.Tensor) -> int:
    """The most tokens that see each other directly."""
    return FEW if decay.dim() == k.dim() else BLOCK


class Blocks:
    """Keys, values and decays in C blocks of L tokens.

    Args:
        k: [..,S,N].
        v: [..,S,P].
        decay: [..,S] or [..,S,N].
        beta: [..,S], for the delta rule.
        block: the most tokens of a block.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor | None,
        block: int,
    ) -> None:
        self.length = min(block, v.shape[-2])
        self.each = decay.dim() == k.dim()  # of N features has a decay
        self.k, self.v = self._opened(k), self._opened(v)
        self.decay = self._opened(decay if self.each else decay.unsqueeze(-1))  # [..,C,L,N|1]
        self.left = _left(self.decay)  # [..,C,L,L,N|1]
        self.known: torch.Tensor | None = None
        if beta is not None:
            self._take_differences(self._opened(beta.unsqueeze(-1)))

    def _opened(self, x: torch.Tensor) -> torch.Tensor:
        """[..,S,D] as [..,C,L,D], with zeros behind the last token."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        missing = -x.shape[-2] % self.length
        return F.pad(wide, [0, 0, 0, missing]).unflatten(-2, (-1, self.length))

    def _take_differences(self, beta: torch.Tensor) -> None:
        """By the delta rule: what tokens take in if the state in front of their block is 0.

        `known` [..,C,L,N] times that state is what they take in less if it is not.
        """
        wanted = torch.cat([self.v, self.k * self._faded()], -1) * beta
        solved = torch.linalg.solve_triangular(
            self._scores(self.k * beta), wanted, upper=False, unitriangular=True
        )
        self.v, self.known = solved.split([self.v.shape[-1], self.k.shape[-1]], -1)

    def _faded(self) -> torch.Tensor:
        """What is left, at each token, of the state in front of its block: [..,C,L,N|1]."""
        return self.decay.cumsum(-2).exp()

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [..,C,L,N] times keys, decayed: [..,C,L,L]; 0 for keys behind a row."""
        if self.each:
            return (x.unsqueeze(-2) * self.k.unsqueeze(-3) * self.left).sum(-1)
        return (x @ self.k.mT) * self.left.squeeze(-1)

    def read(self, q: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
        """What tokens read, [..,C,L,P].

        Args:
            q: [..,S,N].
            states: as `states` gives them; None where there is one block, which starts from 0.
        """
        q = self._opened(q)
        if states is None:
            return self._scores(q) @ self.v
        starts = states[..., :-1, :, :]
        taken = self.v if self.known is None else self.v - self.known @ starts
        return self._scores(q) @ taken + (q * self._faded()) @ starts

    def states(self, first: torch.Tensor | None) -> torch.Tensor:
        """The states in front of all blocks and behind the last, [..,C+1,N,P].

        Args:
            first: [..,N,P], in front of the first block; None is 0.
        """
        entering = (self.k * self.left[..., -1, :, :]).mT  # [..,C,N,L]
        own = entering @ self.v
        first = torch.zeros_like(own[..., 0, :, :]) if first is None else first.to(own.dtype)
        decay = self.decay.sum(-2)  # [..,C,N|1]
        if self.known is None:
            return _summed(torch.cat([first.unsqueeze(-3), own], -3), F.pad(decay, [0, 0, 1, 0]))
        left, found = decay.exp().unsqueeze(-1), [first]
        for block in range(own.shape[-3]):
            less = entering[..., block, :, :] @ (self.known[..., block, :, :] @ found[-1])
            found.append(
                left[..., block, :, :] * found[-1] + own[..., block, :, :] - less
            )
        return torch.stack(found, -3)


def _summed(terms: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Running sums of terms [..,C,N,P] that decay, [..,C,N|1]: linear attention with N of 1."""
    if decay.shape[-1] == 1:
        each = terms.new_ones((*terms.shape[:-2], 1))
        found = linear_attention(each, each, terms.flatten(-2), decay.squeeze(-1))
        return found.unflatten(-1, terms.shape[-2:])
    terms = terms.transpose(-3, -2)  # features are as heads
    each = terms.new_ones((*terms.shape[:-1], 1))
    return linear_attention(each, each, terms, decay.mT).transpose(-3, -2)


def _left(decay: torch.Tensor) -> torch.Tensor:
    """How much is left of entry j at entry i, [..,L,L,D]: exp of the decays behind j up to i."""
    size = decay.shape[-2]
    later = torch.arange(size, device=decay.device)
    behind = (later[:, None] > later)[..., None]
    each = decay.unsqueeze(-2).expand(*decay.shape[:-1], size, decay.shape[-1])
    sums = each.masked_fill(~behind, 0.0).cumsum(-3)
    return sums.exp().masked_fill(behind.transpose(0, 1), 0.0)
