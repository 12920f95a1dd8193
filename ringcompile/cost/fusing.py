"""What a compiled program costs: neighbours that only move bytes are one kernel.

`run --compile` has Inductor compile what lies between communications (`runtime/piecewise.py`).
Inductor makes one kernel of a chain of pointwise ops, casts, copies and reductions, which reads
once what comes from outside and writes once what is read outside (Ansel et al., PyTorch 2,
ASPLOS 2024). Matmuls, attention and communication stay as they are. A rank's memory is not counted
anew: values inside such a kernel are never written, so the peak that is given is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.values import Values, distinct_bytes, storages
from ringcompile.ops.compilable import is_compilable

# A kernel that does several of these runs at the rate of the last of them.
_RATES = ("stream", "special", "strided", "reduction")

# The kernels of each node, when it runs on its own.
Kernels = Mapping[fx.Node, Sequence[Kernel]]
Group = dict[fx.Node, None]


def fused(values: Values, kernels: Kernels) -> dict[fx.Node, Sequence[Kernel]]:
    """The kernels of a compiled program: the last node of each group has that of all.

    Args:
        values: of a rank's program.
        kernels: of every call of it, in order, when it runs on its own.
    """
    found = dict(kernels)
    for group in groups(kernels):
        working = [node for node in kernels if node in group and kernels[node]]
        if len(working) > 1:
            found.update(dict.fromkeys(working, ()))
            found[working[-1]] = [_kernel_of(values, group, working, kernels)]
    return found


def groups(kernels: Kernels) -> list[Group]:
    """Nodes that share a kernel, views among them.

    Two nodes do if one reads the other and nothing lies on any way between them that has to run
    on its own. So each node has a depth, the number of such ops in front of it on the longest way,
    and a group is what is connected at one depth.

    Args:
        kernels: as for `fused`.
    """
    piece, place, group_of = 0, dict[fx.Node, tuple[int, int]](), dict[fx.Node, Group]()
    for node, launched in kernels.items():
        operands = [operand for operand in node.all_input_nodes if operand in place]
        depth = max((place[x][1] + (x not in group_of) for x in operands), default=0)
        compilable = is_compilable(node)
        piece += not compilable
        place[node] = (piece, depth)
        if compilable and all(kernel.kind in _RATES for kernel in launched):
            near = [group_of[x] for x in operands if x in group_of and place[x] == place[node]]
            group = {n: None for each in near for n in each} | {node: None}
            group_of.update(dict.fromkeys(group, group))
    return list({id(group): group for group in group_of.values()}.values())


def _kernel_of(
    values: Values, group: Group, working: Sequence[fx.Node], kernels: Kernels
) -> Kernel:
    parts = [kernel for node in working for kernel in kernels[node]]
    made = {identity for node in working for identity, _ in storages(values.of[node])}
    read = {operand for node in working for operand in node.all_input_nodes}
    kept = {
        identity
        for node in group if any(user not in group for user in node.users)
        for identity, _ in storages(values.of[node])
    }
    inputs = [x for node in read for x in _tensors(values, node) if _identity(x) not in made]
    outputs = [x for node in working for x in _tensors(values, node) if _identity(x) in kept]
    return Kernel(
        max((part.kind for part in parts), key=_RATES.index),
        parts[-1].dtype,
        _bytes_once(inputs) + _bytes_once(outputs),
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
