"""Bodies of the ops that keep something from call to call: keys, prefix sums, last inputs.

A rank keeps keys and values in slots, in the order in which they came. Which positions its slots
hold is a tensor beside them, `places`; masks are always made from positions, never from slots. Its
length is the number of slots in use, so that what lies in the others is never read.
"""

from __future__ import annotations

import torch

from ringcompile.ops import kernels
from ringcompile.ops.attention import State, combine
from ringcompile.ops.blocks import Band
from ringcompile.ops.linear_attention import Blocks
from ringcompile.ops.running import BY_NAME, recurrence
from ringcompile.ops.slots import BLOCK


def store(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Write the rows of x [B,G,S,D] into the cache [B,G,slots,D], in place; returns x.

    Args:
        x: keys or values of new tokens.
        cache: where they are kept. The last slot takes what other ranks keep; it is never read.
        slots: int64 [S], the slot of each new token.
    """
    cache.index_copy_(2, slots, x)
    return x


def cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cached_k: torch.Tensor,
    cached_v: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    lower: int | None = None,
    upper: int | None = None,
    wide: bool = False,
    on_device: bool = False,
) -> State:
    """Attention of new queries over the keys that this rank keeps, as a state [out, lse].

    A rank that keeps none returns 0 with a log-sum-exp of -inf.

    On request it asks the device for nothing: `places` then has an entry for every slot that is
    read, in use or not. Of one that is not in use it is a position behind every query, so that the
    band, which lets no query see a later key, hides it. Such slots hold finite numbers.

    Args:
        q: [B,H,S,D], queries of the new tokens.
        k: [B,G,S,D], keys of the new tokens, which `store` has written; not read again.
        v: [B,G,S,E], likewise.
        cached_k: [B,G,slots,D].
        cached_v: [B,G,slots,E].
        places: int64 [used], the positions in the first slots, increasing; see above.
        positions: int64 [S], of the queries.
        key_mask: [B|1,1,1,capacity], by position; bool (True is visible) or additive.
        mask: [B|1,H|1,S|1,capacity], likewise.
        scale: as in `attention`.
        softcap: likewise.
        lower: the smallest visible query position - key position.
        upper: the largest one.
        wide: whether out is wanted as precise as lse, for states to be merged.
        on_device: whether only the device knows how many slots are in use.
    """
    read, band = places.shape[0], Band(lower, upper)
    masks = [x for x in (key_mask, mask) if x is not None]
    parts = [x if x.shape[3] == 1 else x.index_select(
        3, places.clamp(max=x.shape[3] - 1) if on_device else places) for x in masks]
    causal = not (on_device or parts) and band.is_causal and places.shape == positions.shape and (
        torch.equal(places, positions)
    )
    # One query comes behind every key: only a window hides any.
    if on_device or (not causal and (q.shape[2] > 1 or upper is not None or lower != 0)):
        parts.append(band.mask(positions, places))
    out, lse = kernels.attend(
        q, cached_k.narrow(2, 0, read), cached_v.narrow(2, 0, read), scale=scale, causal=causal,
        mask=combine(parts), softcap=softcap, wide=wide,
    )
    return [out, lse]


def pack_state(state: State, *, dim: int = 2, ways: int = 1, runs: int = 1) -> torch.Tensor:
    """A state as one tensor, so that one transfer carries both of its parts: a part for each rank.

    Args:
        state: [out, lse], out [B,H,S,E].
        dim: what is divided over the ranks: heads (1) or tokens (2).
        ways: the number of ranks.
        runs: each rank's entries lie in so many runs; the first runs of all ranks come first.

    Returns:
        [ways,S,B,H/ways,E+1], or [ways,S/ways,B,H,E+1].
    """
    out, lse = state
    parts = [x.permute(2, 0, 1, 3) for x in (out.to(lse.dtype), lse.unsqueeze(-1))]
    place = {1: 2, 2: 0}[dim]
    opened = [x.unflatten(place, (runs, ways, -1)).movedim(place + 1, 0) for x in parts]
    return torch.cat(opened, -1).flatten(place + 1, place + 2)


def merge_states(packed: torch.Tensor) -> State:
    """The state over all keys, from those over each rank's: [ranks,S,B,H,E+1]."""
    first, *others = (
        part.permute(1, 2, 0, 3).split([part.shape[-1] - 1, 1], -1) for part in packed.unbind()
    )
    out = torch.empty_like(packed[0, ..., 1:]).permute(1, 2, 0, 3).copy_(first[0])
    lse = first[1].squeeze(-1).clone(memory_format=torch.contiguous_format)
    for block_out, block_lse in others:
        kernels.merge(out, lse, block_out, block_lse.squeeze(-1))
    return [out, lse]


def running_sum(
    x: torch.Tensor,
    sums: torch.Tensor,
    positions: torch.Tensor,
    *,
    dim: int,
    dtype: torch.dtype | None = None,
    by: str = "sum",
) -> torch.Tensor:
    """The scan of x along `dim`, begun where the tokens before it ended.

    Args:
        x: [.., S, ..], the new tokens.
        sums: [.., capacity + 1, ..], the results at all positions so far, moved on by one; what
            stands before the first is not read; written in place.
        positions: int64 [S], of the new tokens.
        dim: the dim scanned along.
        dtype: of the result.
        by: which scan: the name of one of `SCANS`.
    """
    kind = BY_NAME[by]
    before = sums.index_select(dim, positions[:1])
    before = before.masked_fill(positions[:1].view(*[1] * x.dim()) == 0, kind.identity)
    total = kind.combine(kind.scan(x, dim, **kind.dtype(dtype)), before)
    sums.index_copy_(dim, positions + 1, total)
    return total


def running_recurrence(
    factor: torch.Tensor, term: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor, *,
    dim: int,
) -> torch.Tensor:
    """The linear recurrence of the new tokens, begun from the state that the ones before left.

    Args:
        factor: [.., S, ..], of the new tokens.
        term: likewise.
        kept: [.., size, ..], the state behind position p at p modulo `size`; written in place.
        positions: int64 [S], of the new tokens, rising by one.
        dim: the dim with the tokens.
    """
    size, first = kept.shape[dim], positions[:1]
    before = kept.index_select(dim, (first - 1) % size)
    before = before.masked_fill(first.view(*[1] * term.dim()) == 0, 0.0)
    states = recurrence(factor, term, dim=dim) + factor.cumprod(dim) * before
    last = min(term.shape[dim], size)
    kept.index_copy_(
        dim, positions[-last:] % size, states.narrow(dim, term.shape[dim] - last, last)
    )
    return states


# Of linear attention: the tokens that are kept, and the states in front of their two blocks. The
# last entry takes what is not kept; it is never read.
KEPT_TOKENS, KEPT_STATES = 2 * BLOCK, 3


def running_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    kept_k: torch.Tensor,
    kept_v: torch.Tensor,
    kept_decay: torch.Tensor,
    kept_beta: torch.Tensor | None,
    kept_states: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """The linear attention of the new tokens, which go on where those before ended.

    A state is kept at the start of a block of positions, not at every token: it is much larger than
    a token. The tokens of the last two blocks are kept with it, so that a session may go back.

    Args:
        q: [..,S,N], of the new tokens.
        k: [..,S,N], likewise.
        v: [..,S,P], likewise.
        decay: [..,S] or [..,S,N], likewise.
        beta: [..,S], likewise, for the delta rule.
        kept_k: [..,64,N], the key of position p at p modulo 64; written in place, as are the next.
        kept_v: [..,64,P], likewise.
        kept_decay: [..,64] or [..,64,N], likewise.
        kept_beta: [..,64], likewise.
        kept_states: [..,3,N,P], the state in front of block b of 32 positions at b modulo 2.
        positions: int64 [S], of the new tokens, rising by one.
    """
    new, first, dim = q.shape[-2], positions[:1], q.dim() - 2
    start = first - first % BLOCK  # where the block of the first new token starts
    places = start + torch.arange(new + BLOCK - 1, device=q.device)
    of_new = (places - first).clamp(0, new - 1)
    source = torch.where(places < first, places % KEPT_TOKENS, KEPT_TOKENS + of_new)
    source = torch.where(places < first + new, source, KEPT_TOKENS + new)
    pairs = [(kept_k, k), (kept_v, v), (kept_decay, decay)]
    if beta is not None and kept_beta is not None:
        pairs.append((kept_beta, beta))
    window = [  # all tokens from `start` on, with zeros behind the last
        torch.cat([kept, x, torch.zeros_like(x.narrow(dim, 0, 1))], dim).index_select(dim, source)
        for kept, x in pairs
    ]
    betas = None if beta is None else window[3]
    blocks = Blocks(window[0], window[1], window[2], betas, BLOCK)
    number = start // BLOCK
    before = kept_states.index_select(-3, number % 2).squeeze(-3)
    states = blocks.states(before.masked_fill(number == 0, 0.0))
    y = blocks.read(q.index_select(-2, of_new), states).flatten(-3, -2)
    _keep(kept_states, states, number, first + new)
    last = min(new, KEPT_TOKENS)
    for kept, x in pairs:
        kept.index_copy_(dim, positions[-last:] % KEPT_TOKENS, x.narrow(dim, new - last, last))
    return y.index_select(-2, positions - start).to(v.dtype)


def _keep(
    kept: torch.Tensor, states: torch.Tensor, number: torch.Tensor, length: torch.Tensor
) -> None:
    """Write the states in front of the last two blocks that have begun.

    Args:
        kept: [..,3,N,P].
        states: [..,C+1,N,P], in front of each block from `number` on.
        number: int64 [1], of a block.
        length: int64 [1], the tokens so far.
    """
    numbers = number + torch.arange(1, states.shape[-3], device=states.device)
    behind = length - BLOCK * numbers  # tokens behind the start of a block; negative if none is
    slots = torch.where((behind >= 0) & (behind < KEPT_TOKENS), numbers % 2, 2)
    kept.index_copy_(-3, slots, states[..., 1:, :, :])


def recent(
    x: torch.Tensor, kept: torch.Tensor, positions: torch.Tensor, *, dim: int, before: int
) -> torch.Tensor:
    """The new tokens of x and as many as `before` in front of them, [.., before + S, ..].

    Args:
        x: [.., S, ..], the new tokens.
        kept: [.., size, ..], that of position p at p modulo `size`, which is `before` or more;
            written in place. Entries in front of position 0 hold anything.
        positions: int64 [S], of the new tokens, rising by one.
        dim: the dim with the tokens.
        before: how many earlier ones are wanted.
    """
    size, last = kept.shape[dim], min(x.shape[dim], kept.shape[dim])
    earlier = torch.arange(-before, 0, device=x.device) + positions[:1]
    window = torch.cat([kept.index_select(dim, earlier % size), x], dim)
    kept.index_copy_(dim, positions[-last:] % size, x.narrow(dim, x.shape[dim] - last, last))
    return window
