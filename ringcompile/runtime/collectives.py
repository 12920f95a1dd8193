"""What ranks do together: what each brings, what each gets, and how a rank's program uses it.

A collective brings one dense tensor. Where every peer gets a part of its own, or sends one, the
parts stand along a new first dim. An op along dim 0 is just that, and nothing is copied around it;
one along another dim has parts cut out before, or put side by side behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import collective_bytes
from ringcompile.ir.types import SequenceSplit
from ringcompile.ops.sequence import join


@dataclass(frozen=True)
class Collective:
    """A rank's part in an exchange with all ranks of a group.

    Attributes:
        node: the node that asks for it.
        kind: the op's name, a key of `ANSWERS`.
        axis: the mesh axis, or several, along which the group lies.
        tensor: what this rank brings.
        detail: what has to agree besides: the dims that are cut and joined.
        sends: of an exchange of rows, how many go to each rank of the group.
        takes: likewise, how many come from each.
    """

    node: str
    kind: str
    axis: str
    tensor: torch.Tensor
    detail: str = ""
    sends: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()

    def num_bytes(self, num_ranks: int, place: int) -> int:
        """The bytes that this rank has to send, whatever the algorithm."""
        if self.kind in _ROWS:
            row = self.tensor.nbytes // max(len(self.tensor), 1)
            return row * sum(count for i, count in enumerate(self.sends) if i != place)
        return int(collective_bytes(self.kind, self.tensor.nbytes, num_ranks))


# Exchanges of as many rows as there are for each rank.
_ROWS = frozenset({"dispatch", "combine"})
Brought = Sequence[Collective]


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, tensors)


def _rows(brought: Brought, place: int) -> torch.Tensor:
    """From each rank the rows that it has for this one."""
    return torch.cat([one.tensor.split(one.sends)[place] for one in brought])


# What a rank gets, from what all ranks of the group brought and its place in the group.
ANSWERS: dict[str, Callable[[Brought, int], Any]] = {
    "gather": lambda brought, place: torch.stack([one.tensor for one in brought]),
    "all_reduce": lambda brought, place: _sum(one.tensor for one in brought),
    "reduce_scatter": lambda brought, place: _sum(one.tensor[place] for one in brought),
    "all_to_all": lambda brought, place: torch.stack([one.tensor[place] for one in brought]),
    "dispatch": _rows,
    "combine": _rows,
}


def asked(
    node: str,
    kind: str,
    operands: Sequence[torch.Tensor],
    arguments: dict[str, Any],
    num_ranks: int,
) -> Collective:
    """The exchange that an op of a program asks for.

    Args:
        node: its name.
        kind: the op's name.
        operands: its operands, what is sent first.
        arguments: its other arguments.
        num_ranks: ranks of the group.

    Raises:
        RingCompileError: what is sent cannot be cut into equal parts for all ranks.
    """
    axis, x = arguments["axis"], operands[0]
    if kind in _ROWS:
        order, *counts = operands[1:]
        sends, takes = (tuple(count.tolist()) for count in counts)
        if kind == "dispatch":
            rows = x.reshape(-1, *x.shape[arguments["lead"] :]).index_select(0, order)
        else:
            rows, sends, takes = x.flatten(0, -2), takes, sends
        return Collective(node, kind, axis, rows, sends=sends, takes=takes)
    if kind == "gather":
        return Collective(node, kind, axis, x.contiguous(), f"along dim {arguments['dim']}")
    if kind == "all_reduce":
        return Collective(node, kind, axis, x.contiguous())
    dim = arguments["dim" if kind == "reduce_scatter" else "split"]
    detail = f"along dim {dim}" + (f" to {arguments['concat']}" if kind == "all_to_all" else "")
    if x.shape[dim] % num_ranks:
        raise RingCompileError(
            f"{kind} in %{node} cannot cut dim {dim} of {list(x.shape)} into {num_ranks} equal "
            "parts", node=node,
        )
    parts = x.unflatten(dim, (num_ranks, x.shape[dim] // num_ranks)).movedim(dim, 0)
    return Collective(node, kind, axis, parts.contiguous(), detail)


def used(
    kind: str,
    answer: Any,
    operands: Sequence[torch.Tensor],
    arguments: dict[str, Any],
    sequence: SequenceSplit | None,
    shape: Sequence[Any],
) -> torch.Tensor:
    """The op's result, from what the exchange gave.

    Args:
        kind: the op's name.
        answer: what the exchange gave.
        operands: as for `asked`.
        arguments: likewise.
        sequence: how the sequence is divided.
        shape: of the result, on this rank.
    """
    if kind == "dispatch":
        lead = arguments["lead"]
        return answer.reshape(len(answer), *(1,) * (lead - 1), *answer.shape[1:])
    if kind == "combine":
        back = torch.empty_like(answer)
        back[operands[1]] = answer
        return back.reshape(tuple(shape))
    if kind == "all_to_all":
        return _joined(answer, arguments["concat"])
    if kind != "gather":
        return answer
    dim, limit = arguments["dim"], arguments["limit"]
    if limit is None:
        return _joined(answer, dim)
    assert sequence is not None
    level = sequence.level(arguments["axis"].split(","))
    chunks: Any = [level.chunks(rank) for rank in range(level.num_ranks)]
    return join(answer.unbind(), chunks, dim, limit)


def _joined(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """Parts [num_ranks, ...] side by side along a dim of theirs."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)
