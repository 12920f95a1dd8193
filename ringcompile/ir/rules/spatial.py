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


def pooling(num_spatial: int, call: Call) -> Factors:
    """Samples, if there are any, and channels pass; the spatial dims, which are last, are whole."""
    names: Names = (*range(rank_of(call) - num_spatial), *(None,) * num_spatial)
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
    """batch_norm: one factor and offset for each channel (dim 1).

    Without running statistics, also in eval mode, they are those of all samples and positions.
    """
    of_batch = call["training"]
    names: Names = tuple(i if i == 1 or not of_batch else None for i in range(rank_of(call)))
    return Factors((names, *((1,),) * (len(call.operands) - 1)), names)


def group_norm(call: Call) -> Factors:
    """Samples pass; channels and what lies behind them are whole."""
    names: Names = ("n", *(None,) * (rank_of(call) - 1))
    return Factors((names, *((None,),) * (len(call.operands) - 1)), names)
