"""Which dims of the inputs vary: the batch, the sequence, and further lengths of tokens.

The caller may say it for each input. For the others the sizes of the example make candidates, and
the code decides: every candidate is exported as a size of its own, and those that the code ties to
the batch of the first input are the batch. Equal numbers alone prove nothing. A length of its own
(`sequence2` and so on) is what other inputs have as their dim 1: a decoder's tokens beside an
encoder's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from ringcompile.errors import RingCompileError
from ringcompile.ir import expr

BATCH, SEQUENCE, FIXED = "batch", "sequence", "fixed"
# The lengths that inputs may have, by what our expressions call them.
LENGTHS = {"s": SEQUENCE, **{name: f"{SEQUENCE}{name[1:]}" for name in expr.LENGTHS[1:]}}
OTHERS = tuple(LENGTHS.values())[1:]
ROLES = (BATCH, *LENGTHS.values(), FIXED)
# For each input by name: what its dims are; those that are not listed are fixed.
Dims = Mapping[str, Mapping[int, str]]
# How many sequences an example of one becomes: a number that no other size equals.
_UNUSUAL = (13, 17, 19, 23, 29, 31, 37, 41, 43)


@dataclass(frozen=True, eq=False)
class Leaf:
    """One tensor among the example inputs.

    Attributes:
        name: of the input.
        tensor: the example.
        roles: for each dim "batch", "sequence", "sequence2", .. or "fixed".
        said: whether the caller said so.
    """

    name: str
    tensor: torch.Tensor
    roles: tuple[str, ...]
    said: bool = False

    def dims_of(self, role: str) -> list[int]:
        """The dims with that role."""
        return [dim for dim, found in enumerate(self.roles) if found == role]

    def size_text(self, dim: int) -> str:
        """One of its sizes, as torch's guards write it."""
        return f"L['{self.name}'].size()[{dim}]"

    @property
    def dynamic(self) -> dict[int, Any] | None:
        """What torch.export is told of it."""
        found = {dim: Dim.AUTO for dim, role in enumerate(self.roles) if role != FIXED}
        return found or None

    def renamed(self, roles: Mapping[str, str]) -> Leaf:
        """The same with other roles for some."""
        return replace(self, roles=tuple(roles.get(role, role) for role in self.roles))

    def without(self, role: str) -> Leaf:
        """The same with these dims fixed."""
        return replace(self, roles=tuple(FIXED if r == role else r for r in self.roles))


@dataclass(frozen=True)
class Example:
    """The example inputs, and what their dims are taken for.

    Attributes:
        leaves: the inputs, in order.
        batch: how many sequences there are; None where no dim is the batch.
        length: their length; None where no dim is the sequence.
        others: the further lengths, by role.
        notes: what the caller should know of what was taken for what.
        widened: whether one sequence was repeated, so that torch.export sees a batch.
        known: inputs whose values are constants of the program.
    """

    leaves: tuple[Leaf, ...]
    batch: int | None
    length: int | None
    others: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    widened: bool = False
    known: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that vary, by role."""
        known = {BATCH: self.batch, SEQUENCE: self.length, **self.others}
        return {role: size for role, size in known.items() if size is not None}

    def fixed(self, role: str) -> Example:
        """The same for this batch, or this length, alone; what is left begins with the sequence."""
        leaves = tuple(leaf.without(role) for leaf in self.leaves)
        if role == BATCH:
            return replace(self, leaves=leaves, batch=None)
        lengths = [(r, size) for r, size in self.sizes.items() if r not in (BATCH, role)]
        renamed = {old: new for (old, _), new in zip(lengths, LENGTHS.values(), strict=False)}
        known = {renamed[old]: size for old, size in lengths}
        return replace(
            self, leaves=tuple(leaf.renamed(renamed) for leaf in leaves),
            length=known.pop(SEQUENCE, None), others=known,
        )

    def of_one_length(self) -> Example:
        """The same with further lengths fixed."""
        leaves = self.leaves
        for role in self.others:
            leaves = tuple(leaf.without(role) for leaf in leaves)
        return replace(self, leaves=leaves, others={})

    def why_tied(self) -> tuple[str, ...]:
        """A note on each further length that is fixed, as the model ties lengths together."""
        dims = [(role, leaf.name) for role in self.others for leaf in self.leaves
                if leaf.dims_of(role)]
        return tuple(
            f"the length of the input '{name}' is fixed to that of the example, "
            f"{self.others[role]}: the model joins lengths, or computes one from another"
            for role, name in dims
        )

    def with_known(self, names: tuple[str, ...]) -> Example:
        """The same with these inputs as constants, of which no dim varies."""
        leaves = tuple(
            replace(leaf, roles=(FIXED,) * len(leaf.roles)) if leaf.name in names else leaf
            for leaf in self.leaves
        )
        held = {role for leaf in leaves for role in leaf.roles}
        others = {role: size for role, size in self.others.items() if role in held}
        return replace(self, leaves=leaves, others=others, known=names)

    def without_batch(self, sizes: Collection[str]) -> Example:
        """The same, with these dims of the inputs fixed; as torch's guards write them."""
        leaves = tuple(
            replace(leaf, roles=tuple(
                FIXED if leaf.size_text(dim) in sizes else role
                for dim, role in enumerate(leaf.roles)
            ))
            for leaf in self.leaves
        )
        return replace(self, leaves=leaves)

    def of_one_sequence(self) -> Example:
        """The first sequence alone, for which the program is then made."""
        leaves = tuple(
            replace(leaf, tensor=_first(leaf.tensor, leaf.dims_of(BATCH))) for leaf in self.leaves
        )
        return replace(self, leaves=leaves).fixed(BATCH)

    def with_roles(self, found: Mapping[str, str]) -> Example:
        """The same, with what dims turned out to be: by what torch's guards call them, a role."""
        leaves = tuple(
            replace(leaf, roles=tuple(
                role if (role := found.get(leaf.size_text(dim), FIXED)) in ROLES else FIXED
                for dim in range(len(leaf.roles))
            ))
            for leaf in self.leaves
        )
        held = {role for leaf in leaves for role in leaf.roles}
        others = {role: size for role, size in self.others.items() if role in held}
        return replace(self, leaves=leaves, others=others)

    def dims_of(self, role: str) -> list[str]:
        """The dims of the inputs with that role, as torch's guards write them."""
        return [leaf.size_text(dim) for leaf in self.leaves for dim in leaf.dims_of(role)]


def read_example(inputs: Mapping[str, torch.Tensor], dims: Dims | None) -> Example:
    """What the dims of example inputs are, as said or by their sizes.

    Raises:
        RingCompileError: no input holds a sequence, or what is said does not fit the inputs.
    """
    leaves = _said([Leaf(n, x, (FIXED,) * x.dim()) for n, x in inputs.items()], dims or {})
    batch, length = _size_said(leaves, BATCH), _size_said(leaves, SEQUENCE)
    first = leaves[0] if leaves else None
    if first is None or (first.tensor.dim() < 2 and not first.said):
        raise RingCompileError(
            "the first example input must be a tensor with the sequence as its dim 1",
            hint="pass, for example, token ids of shape [batch, sequence]; if the dims of your "
                 "input are others, name them with dims=",
        )
    if not first.said:
        batch = first.tensor.shape[0] if batch is None else batch
        if length is None and first.tensor.dim() <= 3:  # else an image: its length is the model's
            length = int(first.tensor.shape[1])
    if length is not None and length < 2:
        raise RingCompileError(f"the example sequence has length {length}; use at least 2")
    guessed = [
        leaf if leaf.said else replace(leaf, roles=_guess(leaf is first, leaf, batch, length))
        for leaf in leaves
    ]
    others = {role: size for role in OTHERS if (size := _size_said(leaves, role)) is not None}
    if length is not None:
        _add_lengths(guessed, others)
    notes = () if length is not None else (_why_fixed(first),)
    return Example(tuple(guessed), batch, length, others, notes)


def _add_lengths(leaves: list[Leaf], others: dict[str, int]) -> None:
    """Give further lengths to dims of inputs that are not said: what may be, the code decides.

    Dim 1 of token ids [batch, length] and of features [batch, length, D] is one, and so are other
    dims of that size.

    Args:
        leaves: as they are guessed so far; changed in place.
        others: the lengths that the caller says, by role; added to.
    """
    free = (role for role in OTHERS if role not in others)
    for size in _further_lengths(leaves):
        if size not in others.values() and (role := next(free, None)) is not None:
            others[role] = size
    known = {size: role for role, size in others.items()}
    for i, leaf in enumerate(leaves):
        if leaf.said or i == 0:
            continue
        leaves[i] = replace(leaf, roles=tuple(
            known.get(size, FIXED) if role == FIXED else role
            for role, size in zip(leaf.roles, leaf.tensor.shape, strict=True)
        ))


def _further_lengths(leaves: Sequence[Leaf]) -> Iterator[int]:
    for leaf in leaves[1:]:
        tokens = 2 if not leaf.tensor.is_floating_point() else 3
        shape, free = leaf.tensor.shape, leaf.roles[:2] == (BATCH, FIXED)
        if free and not leaf.said and len(shape) == tokens and shape[1] > 1:
            yield int(shape[1])


def _first(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor.contiguous()


def _why_fixed(first: Leaf) -> str:
    if first.said:
        return "the sequence length is fixed to that of the example, because dims names no sequence"
    return (
        f"the sequence length is fixed: the input '{first.name}' of {first.tensor.dim()} dims is "
        "taken for images [batch, channels, ...]; if it is not, say which dims are which, for "
        f"example dims={{'{first.name}': {{0: 'batch', 1: 'sequence'}}}}"
    )


def widened(example: Example, model: nn.Module, sure: bool = False) -> Example:
    """The example of one sequence as one of several.

    Args:
        example: with a batch of one.
        model: whose sizes the new batch must not equal.
        sure: only inputs of tokens ([batch, length]) and the first one are taken to have a batch,
            and it is the smallest one.
    """
    taken = {size for leaf in example.leaves for size in leaf.tensor.shape}
    taken |= {int(size) for p in model.parameters() for size in p.shape}
    batch = 2 if sure else next((number for number in _UNUSUAL if number not in taken), 47)
    made = []
    for i, leaf in enumerate(example.leaves):
        tokens = len(leaf.roles) == 2 and leaf.roles[0] == BATCH and leaf.roles[1] != FIXED
        certain = i == 0 or leaf.said or tokens
        kept = leaf if certain or not sure else leaf.without(BATCH)
        tensor = kept.tensor
        for dim in kept.dims_of(BATCH):
            tensor = torch.cat([tensor] * batch, dim)
        made.append(replace(kept, tensor=tensor))
    return replace(example, leaves=tuple(made), batch=batch, widened=True)


def _said(leaves: list[Leaf], dims: Dims) -> list[Leaf]:
    """The leaves with what the caller says of them."""
    known = [leaf.name for leaf in leaves]
    for name, roles in dims.items():
        if name not in known:
            raise RingCompileError(
                f"dims: '{name}' is not a tensor among the example inputs",
                hint=f"the tensors are: {', '.join(known)}",
            )
        for dim, role in roles.items():
            if role not in ROLES:
                raise RingCompileError(
                    f"dims: dim {dim} of '{name}' has the unknown role '{role}'",
                    hint=f"roles are: {', '.join(ROLES)}",
                )
    return [
        replace(leaf, roles=_roles(leaf, dims[leaf.name]), said=True) if leaf.name in dims else leaf
        for leaf in leaves
    ]


def _roles(leaf: Leaf, said: Mapping[int, str]) -> tuple[str, ...]:
    rank = leaf.tensor.dim()
    outside = [dim for dim in said if not -rank <= dim < rank]
    if outside:
        raise RingCompileError(
            f"dims: '{leaf.name}' has shape {list(leaf.tensor.shape)}, and no dim {outside[0]}"
        )
    by_dim = {dim % rank: role for dim, role in said.items()}
    return tuple(by_dim.get(dim, FIXED) for dim in range(rank))


def _size_said(leaves: list[Leaf], role: str) -> int | None:
    sizes = {leaf.name: int(leaf.tensor.shape[dim]) for leaf in leaves if leaf.said
             for dim in leaf.dims_of(role)}
    if len(set(sizes.values())) > 1:
        text = ", ".join(f"'{name}': {size}" for name, size in sizes.items())
        raise RingCompileError(
            f"dims: the {role} has different sizes: {text}",
            hint=None if role == BATCH else f"call a further length '{OTHERS[0]}'",
        )
    return next(iter(sizes.values()), None)


def _guess(
    is_first: bool, leaf: Leaf, batch: int | None, length: int | None
) -> tuple[str, ...]:
    """Candidates by size; a batch of one is dim 0, or else lies beside a dim of the sequence."""
    shape = leaf.tensor.shape
    roles = [SEQUENCE if length is not None and size == length else FIXED for size in shape]
    if is_first and len(shape) <= 3:
        roles[:2] = [BATCH, SEQUENCE]
        return tuple(roles)
    if batch is None:
        return tuple(roles)
    equal = [dim for dim, size in enumerate(shape) if size == batch and roles[dim] == FIXED]
    if batch > 1:  # which of them it is, the code says
        return tuple(BATCH if dim in equal else role for dim, role in enumerate(roles))
    beside = [dim for dim in equal if SEQUENCE in roles[max(dim - 1, 0) : dim + 2]]
    for dim in [dim for dim in equal if dim == 0] or beside[:1]:
        roles[dim] = BATCH
    return tuple(roles)
