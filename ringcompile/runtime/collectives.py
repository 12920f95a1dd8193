"""What ranks do together: what each brings, what each gets, and how a rank's program uses it.

A collective brings one dense tensor. Where every peer gets a part of its own, or sends one, the
parts stand along a new first dim; cutting and joining along the op's own dim is the program's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

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
    """

    node: str
    kind: str
    axis: str
    tensor: torch.Tensor
    detail: str = ""

    def num_bytes(self, num_ranks: int) -> int:
        """The bytes that this rank has to send, whatever the algorithm."""
        return int(collective_bytes(self.kind, self.tensor.nbytes, num_ranks))


Tensors = Sequence[torch.Tensor]


def _sum(tensors: Tensors) -> torch.Tensor:
    return reduce(torch.add, tensors)


# What a rank gets, from what all ranks of the group brought and its place in the group.
ANSWERS: dict[str, Callable[[Tensors, int], Any]] = {
    "gather": lambda brought, place: list(brought),
    "all_reduce": lambda brought, place: _sum(brought),
    "reduce_scatter": lambda brought, place: _sum([tensor[place] for tensor in brought]),
    "all_to_all": lambda brought, place: torch.stack([tensor[place] for tensor in brought]),
}


def asked(
    node: str, kind: str, x: torch.Tensor, arguments: dict[str, Any], num_ranks: int
) -> Collective:
    """The exchange that an op of a program asks for.

    Args:
        node: its name.
        kind: the op's name.
        x: its operand.
        arguments: its other arguments.
        num_ranks: ranks of the group.
    """
    axis = arguments["axis"]
    if kind == "gather":
        return Collective(node, kind, axis, x.contiguous(), f"along dim {arguments['dim']}")
    if kind == "all_reduce":
        return Collective(node, kind, axis, x.contiguous())
    dim = arguments["dim" if kind == "reduce_scatter" else "split"]
    detail = f"along dim {dim}" + (f" to {arguments['concat']}" if kind == "all_to_all" else "")
    return Collective(node, kind, axis, torch.stack(x.chunk(num_ranks, dim)), detail)


def used(
    kind: str, answer: Any, arguments: dict[str, Any], sequence: SequenceSplit | None
) -> torch.Tensor:
    """The op's result, from what the exchange gave."""
    if kind == "all_to_all":
        return torch.cat(answer.unbind(), arguments["concat"])
    if kind != "gather":
        return answer
    dim, limit = arguments["dim"], arguments["limit"]
    if limit is None:
        return torch.cat(answer, dim)
    assert sequence is not None
    level = sequence.level(arguments["axis"].split(","))
    chunks: Any = [level.chunks(rank) for rank in range(level.num_ranks)]
    return join(answer, chunks, dim, limit)
