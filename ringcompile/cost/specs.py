"""All the ways to lay out a number of ranks over the mesh axes, and what each is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from ringcompile.mesh import Mesh

# Outermost first: ranks that exchange most are neighbours, and share a node if any do.
AXES = ("pp", "dp", "ring", "ep", "ulysses", "tp")


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    Attributes:
        mesh: the parallel spec; axes of size 1 are left out.
        order: "zigzag" or "contiguous", "auto" where no axis divides the sequence.
        ring: "rotate" or "gather".
        tp_sequence: whether `tp` divides the sequence between layers.
        capacity: "exact" or "local".
        microbatches: into how many parts the batch is cut.
    """

    mesh: Mesh
    order: str = "auto"
    ring: str = "rotate"
    tp_sequence: bool = False
    capacity: str = "exact"
    microbatches: int = 1

    @property
    def options(self) -> dict[str, object]:
        """What is not in the mesh and not as it is by default."""
        default = Variant(self.mesh)
        fields = ("order", "ring", "tp_sequence", "capacity", "microbatches")
        return {name: getattr(self, name) for name in fields
                if getattr(self, name) != getattr(default, name)}

    def __str__(self) -> str:
        return " ".join([str(self.mesh), *(f"{k}={v}" for k, v in self.options.items())])


def factorisations(num_ranks: int) -> Iterator[Mesh]:
    """All meshes of so many ranks, in a fixed order."""
    for sizes in _factors(num_ranks, len(AXES)):
        axes = tuple((name, size) for name, size in zip(AXES, sizes, strict=True) if size > 1)
        yield Mesh(axes or (("ring", 1),))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many factors whose product is the number."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def reordered(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh, and, where it divides the sequence over two axes, with these the other way round.

    On several nodes it matters which of the two stays within a node.
    """
    yield mesh
    names = mesh.names
    if "ring" in names and "ulysses" in names:
        i, j = names.index("ring"), names.index("ulysses")
        axes = list(mesh.axes)
        axes[i], axes[j] = axes[j], axes[i]
        yield Mesh(tuple(axes))


def variants(mesh: Mesh, batch: int) -> Iterator[Variant]:
    """The variants of a mesh; which capacities there are is for the caller to know.

    Args:
        mesh: the parallel spec.
        batch: sequences of a step.
    """
    ring, tp, pp = (mesh.size(axis) for axis in ("ring", "tp", "pp"))
    share = batch // mesh.size("dp")
    counts = [m for m in (1, 2, 4, 8, 16, 32) if share % m == 0] if pp > 1 else [1]
    base = Variant(mesh)
    forms = [base]
    if ring > 1 or mesh.size("ep") > 1:
        forms = [replace(base, order=order) for order in ("zigzag", "contiguous")]
        forms += [replace(base, order="contiguous", ring="gather")] * (ring > 1)
    if tp > 1:
        forms += [replace(forms[0], tp_sequence=True)]
    yield from (replace(form, microbatches=count) for form in forms for count in counts)


def representatives(mesh: Mesh, most: int = 32) -> list[list[int]]:
    """Ranks that stand for all: lists of ranks to simulate together.

    Ranks that differ in `tp`, `ulysses`, `ep` or `dp` do the same on other parts. On the ring each
    has its own place among the positions: all of them together, or, if they are more than `most`,
    the first, the middle and the last one by themselves. Every stage of a pipeline is its own.
    """
    places = range(mesh.size("ring"))
    sets = [list(places)]
    if len(places) > most:
        sets = [[place] for place in sorted({0, len(places) // 2, len(places) - 1})]
    names = mesh.names

    def rank(place: int, stage: int) -> int:
        at = dict.fromkeys(names, 0) | {n: v for n, v in (("ring", place), ("pp", stage))
                                        if n in names}
        return mesh.rank(at)

    return [[rank(place, stage) for stage in range(mesh.size("pp")) for place in chosen]
            for chosen in sets]


def num_ranks(mesh: Mesh) -> int:
    """The product of the axes' sizes."""
    return prod(size for _, size in mesh.axes)
