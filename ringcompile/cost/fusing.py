"""What a fused group costs: one kernel that reads and writes once what passes its border.

A group's values that nothing outside reads are never written. A rank's memory is not counted
anew for them, so the peak that is given is an upper bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import fx

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.values import Values, distinct_bytes, storages
from ringcompile.ir.fused import groups_of, needs_whole
from ringcompile.ir.nodes import location_of
from ringcompile.ir.printer import block_at

# A kernel that does several of these runs at the rate of the last of them.
RATES = ("stream", "special", "strided", "reduction")

# The kernels of each node, when it runs on its own.
Kernels = Mapping[fx.Node, Sequence[Kernel]]


@dataclass(frozen=True)
class AcrossBlocks:
    """What is known of a group whose nodes lie in several blocks of the model.

    Attributes:
        first, last: the module paths of its first and last nodes.
        behind: the kernel of the nodes in the last block by themselves.
        between: the kernel of the group if later nodes also read what the last block reads of it.
    """

    first: str
    last: str
    behind: Kernel
    between: Kernel


def fused(
    values: Values, kernels: Kernels
) -> tuple[dict[fx.Node, Sequence[Kernel]], dict[fx.Node, AcrossBlocks]]:
    """The kernels of a program with its groups: the last node of each has the kernel of all.

    Args:
        values: of a rank's program.
        kernels: of every call of it, in order, when it runs on its own.

    Returns:
        the kernels of each node, and what is known of groups in several blocks.
    """
    found, across = dict(kernels), dict[fx.Node, AcrossBlocks]()
    for group in groups_of(kernels):
        working = [node for node in group if kernels[node]]
        if len(working) < 2:
            continue
        found.update(dict.fromkeys(working, ()))
        found[working[-1]] = [kernel_of(values, group, kernels)]
        runs = groupby(group, lambda node: block_at(location_of(node).layer))
        parts = [list(run) for _, run in runs]
        if len(parts) > 1 and any(kernels[node] for node in parts[-1]):
            across[working[-1]] = _across(values, group, parts[-1], kernels)
    return found, across


def _across(
    values: Values, group: Sequence[fx.Node], last: Sequence[fx.Node], kernels: Kernels
) -> AcrossBlocks:
    before = set(group).difference(last)
    handed_on = {x for node in last for x in node.all_input_nodes if x in before}
    return AcrossBlocks(
        location_of(group[0]).layer, location_of(last[-1]).layer,
        kernel_of(values, last, kernels), kernel_of(values, group, kernels, handed_on),
    )


def kernel_of(
    values: Values, group: Sequence[fx.Node], kernels: Kernels,
    written: Collection[fx.Node] = (),
) -> Kernel:
    """The kernel that computes some nodes of a program together, and those that it stands for.

    Args:
        values: of a rank's program.
        group: thin nodes, in order; some of them launch kernels by themselves.
        kernels: as for `fused`.
        written: nodes of the group whose results are written though nothing else may read them.
    """
    working, inside = [node for node in group if kernels[node]], set(group)
    parts = [kernel for node in working for kernel in kernels[node]]
    if len(parts) == 1:
        return parts[0]
    made = {identity for node in working for identity, _ in storages(values.of[node])}
    kept = {
        identity
        for node in group if node in written or any(user not in inside for user in node.users)
        for identity, _ in storages(values.of[node])
    }
    read = ((x, node) for node in working for x in node.all_input_nodes)
    pairs = dict.fromkeys((x, _looked_up(node, x)) for x, node in read)
    inputs = [x for pair in pairs for x in _read(values, *pair) if _identity(x) not in made]
    outputs = [x for node in working for x in _tensors(values, node) if _identity(x) in kept]
    return Kernel(
        max((part.kind for part in parts), key=RATES.index),
        parts[-1].dtype,
        _bytes_once(inputs) + _bytes_once(outputs),
        parts=tuple(parts),
    )


def _looked_up(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """What a gather takes from an operand, of which it reads no more than that."""
    return node if needs_whole(node, operand) else None


def _read(values: Values, operand: fx.Node, taken: fx.Node | None) -> tuple[torch.Tensor, ...]:
    if taken is None:
        return _tensors(values, operand)
    table = values.tensor(operand)
    rows = min(values.tensor(taken).numel(), table.untyped_storage().nbytes() // table.itemsize)
    return (table.as_strided((rows,), (1,), 0),)


def _tensors(values: Values, node: fx.Node) -> tuple[torch.Tensor, ...]:
    value = values.of[node]
    return value if isinstance(value, tuple) else (value,)


def _identity(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes_once(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors, those that are read in several views no more than once."""
    touched: dict[int, int] = {}
    whole = {}
    for tensor in tensors:
        identity = _identity(tensor)
        touched[identity] = touched.get(identity, 0) + distinct_bytes(tensor)
        whole[identity] = tensor.untyped_storage().nbytes()
    return sum(min(num_bytes, whole[identity]) for identity, num_bytes in touched.items())
