"""What can be known of a tensor that helps to make a mask: values of the abstract interpretation.

Dims are counted from the right (-1 is the last), so broadcasting changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ringcompile.ir.expr import Size, equal, simplify


@dataclass(frozen=True)
class Affine:
    """An integer tensor whose element at index i is constant + sum of coefficient[d] * i[d]."""

    coefficients: tuple[tuple[int, Size], ...] = ()
    constant: Size = 0

    @classmethod
    def of(cls, coefficients: dict[int, Size], constant: Size) -> Affine:
        """Simplified, sorted, without zero coefficients: equal functions compare equal."""
        kept = {d: simplify(c) for d, c in coefficients.items() if not equal(c, 0)}
        return cls(tuple(sorted(kept.items())), simplify(constant))

    @property
    def is_never_negative(self) -> bool:
        """Provably, for all indices: they are never negative themselves."""
        numbers = (self.constant, *(c for _, c in self.coefficients))
        return all(isinstance(number, int) and number >= 0 for number in numbers)

    def __add__(self, other: Affine) -> Affine:
        total = dict(self.coefficients)
        for dim, c in other.coefficients:
            total[dim] = total.get(dim, 0) + c
        return Affine.of(total, self.constant + other.constant)

    def scaled(self, factor: Size) -> Affine:
        """Every element times `factor`."""
        return Affine.of({d: c * factor for d, c in self.coefficients}, self.constant * factor)

    def moved(self, dims: dict[int, int]) -> Affine:
        """The value with its dims renamed; a dim of size 1 may be gone, its index is always 0."""
        return Affine.of({dims[d]: c for d, c in self.coefficients if d in dims}, self.constant)


@dataclass(frozen=True)
class Test:
    """One condition of a conjunction: `value >= 0` where that is understood, else a bool node."""

    value: Affine | None
    node: fx.Node | None


@dataclass(frozen=True)
class Condition:
    """A boolean tensor: all tests hold.

    No tests is True everywhere; `never` is False everywhere.
    """

    tests: tuple[Test, ...] = ()
    never: bool = False

    @property
    def constant(self) -> bool | None:
        """The value of all elements where it is known to be one, else None."""
        if self.never:
            return False
        return True if not self.tests else None

    def negated(self) -> Condition | None:
        """The opposite, where it is one test again."""
        if self.constant is not None:
            return Condition(never=bool(self.constant))
        if len(self.tests) == 1 and self.tests[0].value is not None:
            return Condition((Test(self.tests[0].value.scaled(-1) + Affine((), -1), None),))
        return None


@dataclass(frozen=True)
class Choice:
    """A tensor of two numbers: one where the condition holds, the other elsewhere."""

    condition: Condition
    true: float
    false: float


Value = Affine | Condition | Choice | None
