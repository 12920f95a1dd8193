"""All the ways to lay out a number of ranks over the mesh axes, and what each is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from ringcompile.axes import AXES
from ringcompile.cost.hardware import Cluster
from ringcompile.mesh import Mesh
from ringcompile.options import Given, Options

# Axes without ranks divide no work among GPUs.
_ACROSS = tuple(axis.name for axis in AXES.values() if axis.has_ranks)


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
        overlap: "none", "schedule", or "halves", see `passes/schedule.py` and `passes/halves.py`.
    """

    mesh: Mesh
    order: str = "auto"
    ring: str = "rotate"
    tp_sequence: bool = False
    capacity: str = "exact"
    microbatches: int = 1
    overlap: str = "none"

    def choices(self, length: int | None = None, stages: tuple[str, ...] = ()) -> Given:
        """The keywords of `transform` that make its program."""
        return Options(
            self.order, self.capacity, self.ring, self.tp_sequence, stages, length
        ).given()

    @property
    def sequences(self) -> int:
        """How many sequences one run of its program takes."""
        return 2 if self.overlap == "halves" else 1

    @property
    def options(self) -> dict[str, object]:
        """What is not in the mesh and not as it is by default."""
        default = Variant(self.mesh)
        fields = ("order", "ring", "tp_sequence", "capacity", "microbatches", "overlap")
        return {name: getattr(self, name) for name in fields
                if getattr(self, name) != getattr(default, name)}

    def __str__(self) -> str:
        return " ".join([str(self.mesh), *(f"{k}={v}" for k, v in self.options.items())])


def factorisations(num_ranks: int) -> Iterator[Mesh]:
    """All meshes of so many ranks, in a fixed order."""
    for sizes in _factors(num_ranks, len(_ACROSS)):
        axes = tuple((name, size) for name, size in zip(_ACROSS, sizes, strict=True) if size > 1)
        yield Mesh(axes or (("ring", 1),))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many factors whose product is the number."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def reordered(mesh: Mesh, per_node: int) -> Iterator[Mesh]:
    """The mesh, and, where it divides the sequence over two axes, with these the other way round.

    Where both do not fit on one node it matters which of the two stays within it.

    Args:
        mesh: the parallel spec.
        per_node: devices of a node.
    """
    yield mesh
    names = mesh.names
    if "ring" in names and "ulysses" in names:
        i, j = names.index("ring"), names.index("ulysses")
        if prod(size for _, size in mesh.axes[i:]) <= per_node:
            return
        axes = list(mesh.axes)
        axes[i], axes[j] = axes[j], axes[i]
        yield Mesh(tuple(axes))


def variants(mesh: Mesh, batch: int, order: str = "zigzag") -> Iterator[Variant]:
    """The variants of a mesh; which capacities there are is for the caller to know.

    Args:
        mesh: the parallel spec.
        batch: sequences of a step.
        order: the one that is tried first.
    """
    ring, tp, pp = (mesh.size(axis) for axis in ("ring", "tp", "pp"))
    share = batch // mesh.size("dp")
    counts = [m for m in (1, 2, 4, 8, 16, 32) if share % m == 0] if pp > 1 else [1]
    base = Variant(mesh)
    forms = [base]
    if ring > 1 or mesh.size("ep") > 1:
        forms = [replace(base, order=o) for o in dict.fromkeys((order, "zigzag", "contiguous"))]
        forms += [replace(base, order="contiguous", ring="gather")] * (ring > 1)
    if tp > 1:
        forms += [replace(forms[0], tp_sequence=True)]
    yield from (replace(form, microbatches=count) for form in forms for count in counts)


def ranks_of(mesh: Mesh, places: Iterable[int], stages: Iterable[int]) -> list[int]:
    """Ranks at places of the ring and stages of the pipeline.

    Ranks that differ in `tp` or `dp` do the same on other parts; of those that differ in
    `ulysses` or `ep`, the last holds the last positions.

    Args:
        mesh: the parallel spec.
        places: coordinates on `ring`.
        stages: coordinates on `pp`.
    """
    last = {axis: mesh.size(axis) - 1 for axis in ("ep", "ulysses")}
    found = []
    for stage, place in product(stages, places):
        at = {**last, "ring": place, "pp": stage}
        found.append(mesh.rank({name: at.get(name, 0) for name in mesh.names}))
    return found


def slowest_place(variant: Variant, cluster: Cluster) -> int:
    """The place of a ring that stands for all: the last that gets what it takes from another node.

    If all are on one node, the one with most to do. Under zigzag all have as much to compute, but
    the first has it in kernels of the fewest queries: all others' chunks are seen by its last only.

    Args:
        variant: the spec.
        cluster: says which ranks are on one node.
    """
    ring = variant.mesh.size("ring")
    ranks = ranks_of(variant.mesh, range(ring), [0])
    far = [p for p in range(1, ring) if cluster.node_of(ranks[p]) != cluster.node_of(ranks[p - 1])]
    busy = 0 if variant.order == "zigzag" else ring - 1
    return far[-1] if far else busy


def with_ring(variant: Variant, size: int) -> Variant:
    """The variant on a ring of another size."""
    axes = tuple((name, size if name == "ring" else n) for name, n in variant.mesh.axes)
    return replace(variant, mesh=Mesh(axes))


def one_stage(variant: Variant) -> Variant:
    """One stage of the variant by itself, of one replica, whatever its microbatches."""
    axes = tuple((name, n) for name, n in variant.mesh.axes if name not in ("pp", "dp"))
    return replace(variant, mesh=Mesh(axes or (("ring", 1),)), microbatches=1)


def short_rings(mesh: Mesh, cluster: Cluster) -> tuple[int, int]:
    """Sizes of two rings from which a long one is estimated: both go from node to node, too."""
    names = mesh.names
    inner = names[names.index("ring") + 1 :] if "ring" in names else []
    stride = prod(mesh.size(name) for name in inner)
    size = max(8, 2 * cluster.per_node // stride)
    return size, 2 * size


def overlapping(variant: Variant, batch: int) -> list[Variant]:
    """The variant with more overlap, where it has transfers that can overlap.

    Args:
        variant: the spec and its options.
        batch: sequences of a step.
    """
    if variant.mesh.size("ring") == 1 or variant.ring == "gather":
        return []
    kinds = ["schedule"]
    if batch // (variant.mesh.size("dp") * variant.microbatches) % 2 == 0:
        kinds.append("halves")
    return [replace(variant, overlap=kind) for kind in kinds]
