"""What a fused group costs: one kernel that reads and writes once what passes its border.

A group's values that nothing outside reads are never written. A rank's memory is not counted
anew for them, so the peak that is given is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import fx

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.values import Values, distinct_bytes, storages
from ringcompile.ir.fused import groups_of
from ringcompile.ir.nodes import location_of
from ringcompile.ir.printer import block_at

# A kernel that does several of these runs at the rate of the last of them.
RATES = ("stream", "special", "strided", "reduction")

# The kernels of each node, when it runs on its own.
Kernels = Mapping[fx.Node, Sequence[Kernel]]
# The blocks that a group has nodes of, and the kernel of those in each.
Shares = tuple[tuple[str, Kernel], ...]


def fused(
    values: Values, kernels: Kernels
) -> tuple[dict[fx.Node, Sequence[Kernel]], dict[fx.Node, Shares]]:
    """The kernels of a program with its groups: the last node of each has the kernel of all.

    Args:
        values: of a rank's program.
        kernels: of every call of it, in order, when it runs on its own.

    Returns:
        the kernels of each node; and for groups that lie in several blocks of the model, the
        module path and the kernel of the nodes in each block alone.
    """
    found, shares = dict(kernels), dict[fx.Node, Shares]()
    for group in groups_of(kernels):
        working = [node for node in group if kernels[node]]
        if len(working) < 2:
            continue
        found.update(dict.fromkeys(working, ()))
        found[working[-1]] = [kernel_of(values, group, kernels)]
        runs = groupby(group, lambda node: block_at(location_of(node).layer))
        parts = [list(run) for _, run in runs]
        if len(parts) > 1:
            shares[working[-1]] = tuple(
                (location_of(part[-1]).layer, kernel_of(values, part, kernels))
                for part in parts if any(kernels[node] for node in part)
            )
    return found, shares


def kernel_of(values: Values, group: Sequence[fx.Node], kernels: Kernels) -> Kernel:
    """The kernel that computes some nodes of a program together, and those that it stands for.

    Args:
        values: of a rank's program.
        group: thin nodes, in order; some of them launch kernels by themselves.
        kernels: as for `fused`.
    """
    working, inside = [node for node in group if kernels[node]], set(group)
    parts = [kernel for node in working for kernel in kernels[node]]
    if len(parts) == 1:
        return parts[0]
    made = {identity for node in working for identity, _ in storages(values.of[node])}
    read = {operand for node in working for operand in node.all_input_nodes}
    kept = {
        identity
        for node in group if any(user not in inside for user in node.users)
        for identity, _ in storages(values.of[node])
    }
    inputs = [x for node in read for x in _tensors(values, node) if _identity(x) not in made]
    outputs = [x for node in working for x in _tensors(values, node) if _identity(x) in kept]
    return Kernel(
        max((part.kind for part in parts), key=RATES.index),
        parts[-1].dtype,
        _bytes_once(inputs) + _bytes_once(outputs),
        parts=tuple(parts),
    )


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
