"""Rows for ops over neighbourhoods: convolution, pooling, padding, resizing.

What lies along their spatial dims is whole; samples, and mostly channels, pass.
"""

from __future__ import annotations

from ringcompile.ir.calls import Call
from ringcompile.ir.rules.base import Factors, Names, rank_of, shapes


def convolution(call: Call) -> Factors:
    """N i ..., o i ..., o -> n o ...; with groups the channels are whole."""
    rank = rank_of(call)
    weight = shapes(call)[1]
    spatial: Names = (None,) * (len(weight) - 2)
    out = "o" if call["groups"] == 1 else None
    samples: Names = ("n",) * (rank - len(spatial) - 1)
    bias: tuple[Names, ...] = ((out,),) if len(call.operands) == 3 else ()
    return Factors(((*samples, None, *spatial), (out, None, *spatial), *bias),
                   (*samples, out, *spatial))


def transposed_convolution(call: Call) -> Factors:
    """N i ..., i o ..., o -> n o ...; channels are whole."""
    rank, operands = rank_of(call), shapes(call)
    samples: Names = ("n",) * (rank - len(operands[1]) + 1)
    whole = tuple((None,) * len(shape) for shape in operands[1:])
    names: Names = (*samples, *(None,) * (rank - len(samples)))
    return Factors((names, *whole), names)


def pooling(call: Call) -> Factors:
    """Samples and channels pass; spatial dims, behind the first two, are whole."""
    rank = rank_of(call)
    names: Names = tuple(i if i < 2 and rank > 2 else None for i in range(rank))
    return Factors((names,), names)


def pad(call: Call) -> Factors:
    """Pads come in pairs from the last dim on; a dim that is padded is whole."""
    rank, pads = rank_of(call), list(call["pad"])
    padded = {rank - 1 - i // 2 for i, amount in enumerate(pads) if amount != 0}
    names: Names = tuple(None if i in padded else i for i in range(rank))
    return Factors((names,), names)


def unfold(call: Call) -> Factors:
    """Windows along a dim, which is whole; they lie in a new last dim."""
    rank = rank_of(call) - 1
    dim = call["dimension"] % rank
    names: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((names,), (*names, None))


def channel_norm(call: Call) -> Factors:
    """batch_norm of a model in eval mode: one factor and offset for each channel (dim 1)."""
    rank = rank_of(call)
    names: Names = tuple(range(rank))
    return Factors((names, *((1,),) * (len(call.operands) - 1)), names)


def group_norm(call: Call) -> Factors:
    """Samples pass; channels and what lies behind them are whole."""
    names: Names = ("n", *(None,) * (rank_of(call) - 1))
    return Factors((names, *((None,),) * (len(call.operands) - 1)), names)
