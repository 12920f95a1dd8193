"""Enumerates the parallel specs, and their variants, for a number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from ringcompile.axes import AXES, TIME
from ringcompile.cost.hardware import Cluster
from ringcompile.mesh import Mesh
from ringcompile.options import Given, Options

# Axes without ranks divide no work among GPUs, and tiles are another form of a ring.
_ACROSS = tuple(
    axis.name for axis in AXES.values() if axis.has_ranks and not axis.gathers_queries
)


# A ring of fewer ranks has nothing to gain from tiles.
_LEAST_TILED = 8


@dataclass(frozen=True)
class Variant:
    """A parallel spec with the options under which it is compiled and run.

    Attributes:
        mesh: the parallel spec; axes of size 1 are left out.
        order: "zigzag" or "contiguous", "auto" where no axis divides the sequence.
        ring: "rotate" or "gather".
        tp_sequence: whether `tp` divides the sequence between layers.
        capacity: "exact" or "local".
        microbatches: the number of parts that the batch is cut into.
        overlap: "none", "schedule", or "halves", see `passes/rank/schedule.py` and the
            axis `halves`.
    """

    mesh: Mesh
    order: str = "auto"
    ring: str = "rotate"
    tp_sequence: bool = False
    capacity: str = "exact"
    microbatches: int = 1
    overlap: str = "none"

    def choices(self, length: int | None = None, stages: tuple[str, ...] = ()) -> Given:
        """The keywords of `transform` that compile this variant."""
        return Options(
            self.order, self.capacity, self.ring, self.tp_sequence, stages, length
        ).given()

    @property
    def sequences(self) -> int:
        """The number of sequences in one run of the program."""
        return 2 if self.overlap == "halves" else 1

    @property
    def options(self) -> dict[str, object]:
        """The options that differ from their defaults, the mesh excluded."""
        default = Variant(self.mesh)
        fields = ("order", "ring", "tp_sequence", "capacity", "microbatches", "overlap")
        return {name: getattr(self, name) for name in fields
                if getattr(self, name) != getattr(default, name)}

    def __str__(self) -> str:
        """What `ringcompile transform` takes behind `--parallel`: `ring=4 --order zigzag`."""
        words = [str(self.mesh)]
        for name, value in self.options.items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return " ".join(words)


def factorisations(num_ranks: int) -> Iterator[Mesh]:
    """All meshes with this number of ranks, in a fixed order."""
    for sizes in _factors(num_ranks, len(_ACROSS)):
        axes = tuple((name, size) for name, size in zip(_ACROSS, sizes, strict=True) if size > 1)
        yield Mesh(axes or (("ring", 1),))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All tuples of `count` factors that multiply to a number."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def reordered(mesh: Mesh, per_node: int) -> Iterator[Mesh]:
    """The mesh itself, and with `ring` and `ulysses` swapped where their order matters.

    It matters if the two do not fit on one node together: the inner one then stays within a node.

    Args:
        mesh: the parallel spec.
        per_node: the number of devices on a node.
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
    """The variants of a mesh, for one capacity mode; the caller adds the others.

    Args:
        mesh: the parallel spec.
        batch: the number of sequences in a step.
        order: the order of positions that is tried first.
    """
    ring, tp, pp = (mesh.size(axis) for axis in ("ring", "tp", "pp"))
    share = batch // mesh.size("dp")
    counts = [m for m in (1, 2, 4, 8, 16, 32) if share % m == 0] if pp > 1 else [1]
    base = Variant(mesh)
    forms = [base]
    if ring > 1 or mesh.size("ep") > 1:
        forms = [replace(base, order=o) for o in dict.fromkeys((order, "zigzag", "contiguous"))]
        forms += [replace(base, order="contiguous", ring="gather")] * (ring > 1)
        forms += [replace(forms[0], mesh=tiles) for tiles in _in_tiles(mesh)]
    if tp > 1:
        forms += [replace(forms[0], tp_sequence=True)]
    yield from (replace(form, microbatches=count) for form in forms for count in counts)


def _in_tiles(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh with its ring as tiles of queries and keys, as square as can be, if that is one.

    A rank of a x b tiles sends a - 1 blocks of keys and values, and b - 1 of queries and results:
    of four ranks no fewer bytes than in a ring.
    """
    ring = mesh.size("ring")
    widths = [b for b in range(2, ring) if ring % b == 0 and b * b <= ring]
    if widths and ring >= _LEAST_TILED:
        tile = widths[-1]
        split = {"ring": (("ring", ring // tile), ("tile", tile))}
        yield Mesh(tuple(
            part for name, size in mesh.axes for part in split.get(name, ((name, size),))
        ))


def ranks_of(mesh: Mesh, places: Iterable[int], stages: Iterable[int]) -> list[int]:
    """The ranks at given places of the ring and stages of the pipeline, one rank for each.

    Ranks that differ only in `tp` or `dp` do equal work, so the first of them is taken. Of ranks
    that differ in `tile`, `ulysses` or `ep`, the last is taken, as it holds the last positions.

    Args:
        mesh: the parallel spec.
        places: coordinates on `ring`.
        stages: coordinates on `pp`.
    """
    last = {axis: mesh.size(axis) - 1 for axis in ("tile", "ep", "ulysses")}
    found = []
    for stage, place in product(stages, places):
        at = {**last, "ring": place, "pp": stage}
        found.append(mesh.rank({name: at.get(name, 0) for name in mesh.names}))
    return found


def slowest_place(variant: Variant) -> int:
    """The place of a ring whose rank is the slowest, which a quick estimate simulates.

    The last place sees the keys of all others. Under zigzag all have equal work, but the first
    place has it in kernels with the fewest queries, because only its last chunk sees the chunks of
    other places, and it receives both chunks of each.

    Args:
        variant: the spec.
    """
    return 0 if variant.order == "zigzag" else variant.mesh.size("ring") - 1


def with_ring(variant: Variant, size: int) -> Variant:
    """The variant with a ring of another size."""
    axes = tuple((name, size if name == "ring" else n) for name, n in variant.mesh.axes)
    return replace(variant, mesh=Mesh(axes))


def one_stage(variant: Variant) -> Variant:
    """The variant without `pp`, `dp` and microbatches: one stage of one replica."""
    axes = tuple((name, n) for name, n in variant.mesh.axes if name not in ("pp", "dp"))
    return replace(variant, mesh=Mesh(axes or (("ring", 1),)), microbatches=1)


def short_rings(mesh: Mesh, cluster: Cluster) -> tuple[int, int]:
    """The sizes of two short rings to extrapolate a long one from; they span nodes as it does."""
    names = mesh.names
    inner = names[names.index("ring") + 1 :] if "ring" in names else []
    stride = prod(mesh.size(name) for name in inner)
    size = max(8, 2 * cluster.per_node // stride)
    return size, 2 * size


def overlapping(variant: Variant, batch: int) -> list[Variant]:
    """The variant with more overlap, if it has transfers that can overlap.

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


def in_time(variant: Variant) -> Variant | None:
    """The variant with `time=2`, if one half of the sequence can hide the other one's transfers.

    Stages of a pipeline run one half behind the other and keep keys and values of all their layers
    in between, so only specs without a pipeline are considered. Each rank counting tokens of its
    own for the capacity of experts does not go with `time`.

    Args:
        variant: the spec and its options.
    """
    mesh = variant.mesh
    if mesh.size("ring") == 1 or mesh.size("pp") > 1 or variant.ring == "gather":
        return None
    if variant.capacity == "local":
        return None
    return replace(variant, mesh=mesh.with_axis(TIME, 2))
