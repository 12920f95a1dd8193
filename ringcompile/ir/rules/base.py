"""The mechanism behind the rule table: dims are tied by named factors, and layouts follow factors.

A row names a factor for each dim of each operand and of the output, einsum-like. A factor that
stands in the output passes a split through. A dim without a factor (None), and a factor that is
contracted away, must be whole. `forward` reads layouts off the operands; `backward` says what the
operands would have to be for a wanted output, which is how a slice of a position table, of a
rotary angle or of a mask is computed directly instead of being cut out of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, product
from ringcompile.ir.layout import WHOLE, DimLayout, Layout, regroup
from ringcompile.ir.nodes import layout_of, results_of, type_of
from ringcompile.ir.rules.linear import FIRST, Linear

Names = tuple[Hashable | None, ...]


@dataclass(frozen=True)
class Factors:
    """The factor of each dim of each operand, and of the output."""

    operands: tuple[Names, ...]
    output: Names


@dataclass(frozen=True)
class Placement:
    """The layouts an op needs of its operands, and the one it gives."""

    operands: tuple[Layout, ...]
    output: Layout


class ConflictError(Exception):
    """Two dims of the output would be split over one axis: there is no row for these layouts."""


class Rule:
    """One row of the table.

    Attributes:
        shape_argument: the argument that spells out the output's shape; it is rewritten from the
            local shape, never searched for.
        cheap: recomputing the op on whole operands costs less than sending its output.
        cost: what kind of work the op is; `cost/ops.py` has a row for each kind.
        linear: in which operands it is linear, so that a partial sum may pass through it.
        elementwise: element i of the result is made of elements i of the operands, so it has their
            strides.
    """

    shape_argument: str | None
    cheap: bool
    cost: str
    linear: Linear | None
    elementwise: bool

    def multiplications(self, call: Call) -> Size:
        """The multiplications of a call over all ranks, one for each element of its results."""
        return product(results_of(call.node)[0].shape)

    def forward(
        self, call: Call, layouts: Sequence[Layout], axis_sizes: dict[str, int]
    ) -> Placement:
        """The placement that keeps as much split as the row allows.

        Raises:
            ConflictError: two output dims would be split over one axis.
        """
        raise NotImplementedError

    def backward(
        self, call: Call, wanted: Layout, axis_sizes: dict[str, int]
    ) -> tuple[Layout, ...] | None:
        """The operand layouts from which each rank computes its piece of `wanted`, or None."""
        raise NotImplementedError


@dataclass(frozen=True)
class FactorRule(Rule):
    """A row given by factors, which may depend on the call's arguments and shapes."""

    factors: Callable[[Call], Factors]
    shape_argument: str | None = None
    cheap: bool = True
    cost: str = "stream"
    linear: Linear | None = None
    elementwise: bool = False
    sums: bool = False
    """Factors that two operands share and the output lacks are summed over, and nothing else is."""
    bias: str | None = None
    """The argument of an op that `sums` which is added to the product."""
    without_bias: str | None = None
    """The op of aten that computes the product alone; None if this one does, given no bias."""
    kept: frozenset[Hashable] = frozenset()
    """Factors of operands alone that may be split: the op works on the part it is given."""
    inner: Callable[[Call], Size] | None = None
    """Multiplications for each element of the result, of an op that does not just sum factors."""

    @staticmethod
    def contracted(names: Factors) -> list[Hashable]:
        """The factors that are summed over, of an op that `sums`."""
        held = [f for dims in names.operands for f in dims if f is not None]
        return [f for f in dict.fromkeys(held) if held.count(f) > 1 and f not in names.output]

    def multiplications(self, call: Call) -> Size:
        """For each element of the result, as many as the factors summed over have values."""
        each = self.inner(call) if self.inner else product(self._summed_sizes(call))
        return product([super().multiplications(call), each])

    def _summed_sizes(self, call: Call) -> list[Size]:
        names = self.factors(call)
        sizes = {
            factor: size
            for dims, node in zip(names.operands, call.operands, strict=True)
            for factor, size in zip(dims, type_of(node).shape, strict=True)
        }
        return [sizes[factor] for factor in self.contracted(names)] if self.sums else []

    def given_bias(self, call: Call) -> str | None:
        """The bias, if it is given."""
        return self.bias if self.bias is not None and call[self.bias] is not None else None

    def forward(
        self, call: Call, layouts: Sequence[Layout], axis_sizes: dict[str, int]
    ) -> Placement:
        """A factor's split, the first found among its dims, is that of all dims it names."""
        names = self.factors(call)
        passing = {*names.output, *self.kept}
        assigned: dict[Hashable, DimLayout] = {}
        for dims, layout in zip(names.operands, layouts, strict=True):
            for factor, dim in zip(dims, layout.dims, strict=True):
                if dim and factor is not None and factor in passing:
                    assigned.setdefault(factor, dim)
        return self._placement(names, assigned)

    def backward(
        self, call: Call, wanted: Layout, axis_sizes: dict[str, int]
    ) -> tuple[Layout, ...] | None:
        """The wanted splits, carried by factors; None if a dim without a factor is split."""
        names = self.factors(call)
        assigned: dict[Hashable, DimLayout] = {}
        for factor, dim in zip(names.output, wanted.dims, strict=True):
            if dim and factor is None:
                return None
            if dim:
                assigned[factor] = dim
        for dims, operand in zip(names.operands, call.operands if self.kept else (), strict=False):
            for factor, dim in zip(dims, layout_of(operand).dims, strict=True):
                if factor in self.kept and dim:
                    assigned[factor] = dim
        try:
            return self._placement(names, assigned).operands
        except ConflictError:
            return None

    @staticmethod
    def _placement(names: Factors, assigned: dict[Hashable, DimLayout]) -> Placement:
        def layout(dims: Names) -> Layout:
            return Layout(tuple(assigned.get(f, WHOLE) if f is not None else WHOLE for f in dims))

        output = layout(names.output)
        if output.has_conflict:
            raise ConflictError
        return Placement(tuple(map(layout, names.operands)), output)


@dataclass(frozen=True)
class ViewRule(Rule):
    """A view with the same elements in the same order; see `layout.regroup`."""

    shape_argument: str | None = "shape"
    cheap: bool = True
    cost: str = "view"
    linear: Linear | None = FIRST
    elementwise: bool = False

    def forward(
        self, call: Call, layouts: Sequence[Layout], axis_sizes: dict[str, int]
    ) -> Placement:
        """The operand's split in terms of the new shape; both whole where it has none there."""
        source, target = type_of(call.operands[0]).shape, type_of(call.node).shape
        output = regroup(source, layouts[0], target, axis_sizes)
        if output is None:
            return Placement((Layout.whole(len(source)),), Layout.whole(len(target)))
        return Placement((layouts[0],), output)

    def backward(
        self, call: Call, wanted: Layout, axis_sizes: dict[str, int]
    ) -> tuple[Layout, ...] | None:
        """The wanted split in terms of the operand's shape; None if it has none there."""
        source, target = type_of(call.operands[0]).shape, type_of(call.node).shape
        operand = regroup(target, wanted, source, axis_sizes)
        return None if operand is None else (operand,)


def shapes(call: Call) -> list[tuple[object, ...]]:
    """The global shapes of a call's operands."""
    return [type_of(node).shape for node in call.operands]


def rank_of(call: Call) -> int:
    """The number of dims of a call's output; of several, of the first."""
    return len(results_of(call.node)[0].shape)
