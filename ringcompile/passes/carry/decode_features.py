"""Features of new tokens over the axes that a cache lies along: the Helix form of decoding.

Every rank of `ring` holds all weights and sees every new token. In the simple form of a program
with a cache each of them computes all of a layer. In this form they share it: attention's result
goes to the ranks by heads, and what is behind it is tensor-parallel over `tp` and these axes
together (Bhatia et al., "Helix Parallelism", 2025).

`tensor-parallel` runs on a mesh whose `tp` is longer by that factor. Ranks in one run of R
neighbours on it compute the same queries (`tp//R`) and part behind attention (`tp`). `carry` then
says which axes of the parallel plan that is:

    8/tp//4  ->  8/tp            attention of a rank: the heads that its weights are for
    8/tp     ->  8/tp/ring       its part of them behind attention

`tp` comes first, so that a rank's part of a weight is a part of what it holds of that weight for
prompts: rows or columns beside each other, a view of the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringcompile.axes import AXES, KEEP_TOKENS, AxisRef, refs
from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh

_TP = "tp"
# Tokens of a cache lie along them, and weights as well.
_PARTED = tuple(axis for axis in KEEP_TOKENS if AXES[axis].divides_weights)


def kept_along(mesh: Mesh) -> int:
    """How many ranks share the tokens of a cache."""
    axes = ",".join(axis for axis in KEEP_TOKENS if mesh.size(axis) > 1)
    return mesh.size(axes) if axes else 1


def may_be_helix(mesh: Mesh) -> bool:
    """Whether ranks share the tokens of a cache, and each of them holds all weights for prompts."""
    return kept_along(mesh) > 1 and not any(mesh.size(axis) > 1 for axis in _PARTED)


def check_helix(mesh: Mesh) -> None:
    """Raise RingCompileError where features cannot lie along the axes of a cache."""
    if may_be_helix(mesh):
        return
    along = [axis for axis in _PARTED if mesh.size(axis) > 1]
    if along:
        raise RingCompileError(
            f"decode=helix: the ranks along {along[0]}={mesh.size(along[0])} hold different experts"
            ", and features are divided over ranks that hold the same",
            hint="leave decode out: each of these ranks then runs its own experts",
        )
    axes = [axis for axis in KEEP_TOKENS if axis not in _PARTED]
    raise RingCompileError(
        f"decode=helix: no axis of {mesh} divides the cache by position",
        hint=f"split the sequence over {' or '.join(axes)}, or leave decode out",
    )


def widened(placed: Mesh, mesh: Mesh) -> Mesh:
    """The mesh that `tensor-parallel` sees: all ranks that share a token's features on `tp`."""
    axes = tuple((name, size) for name, size in placed.axes if name != _TP)
    return Mesh((*axes, (_TP, mesh.size(_TP) * kept_along(mesh))))


@dataclass(frozen=True)
class Spread:
    """Which axes of the parallel plan stand for places on the longer `tp`.

    Attributes:
        tp: the size of `tp` in the parallel plan.
        axes: those that the cache lies along.
        ranks: how many ranks share a cache.
    """

    tp: int
    axes: tuple[str, ...]
    ranks: int

    def axes_of(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The axes of the parallel plan, outermost first.

        Raises:
            RingCompileError: heads lie on groups of ranks that no axes of the plan are.
        """
        return tuple(axis for given in axes for ref in refs(given) for axis in self._of(ref))

    def _of(self, ref: AxisRef) -> tuple[str, ...]:
        if ref.name != _TP:
            return (str(ref),)
        outer = (_TP,) if self.tp > 1 else ()
        if not ref.part:
            return (*outer, *self.axes)
        within = ref.part == "%"
        if ref.run == self.ranks:
            return self.axes if within else outer
        if ref.run % self.ranks == 0:
            part = str(AxisRef(_TP, ref.part, ref.run // self.ranks))
            return (part, *self.axes) if within else (part,)
        if self.ranks % ref.run or len(self.axes) > 1:
            raise RingCompileError(
                f"the features of a new token would have to be split over groups of {ref.run} "
                f"ranks, which is not possible on {' x '.join((*outer, *self.axes))}",
                hint="pass --decode simple",
            )
        part = str(AxisRef(self.axes[0], ref.part, ref.run))
        return (part,) if within else (*outer, part)
