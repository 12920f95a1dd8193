"""What can be known of a tensor that helps to make a mask: values of the abstract interpretation.

Dims are counted from the right (-1 is the last), so broadcasting changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ringcompile.ir.expr import Size, equal, simplify
from ringcompile.ops.blocks import Band


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
class Floored:
    """An integer tensor: an affine one, less an unknown number for each batch entry, by a divisor.

    Attributes:
        value: the affine part.
        shift: tells unknown numbers apart; None for none.
        divisor: what the difference is divided by, rounded down.
    """

    value: Affine
    shift: object = None
    divisor: int = 1


@dataclass(frozen=True)
class Test:
    """One condition of a conjunction: `value >= 0` where that is understood, else a bool node.

    Attributes:
        value: what is understood of it.
        node: the bool tensor, in dims that line up with the mask; None where there is none.
        implied: it follows from the other tests, and may be left out.
        reflexive: it holds wherever query and key are the same position.
        kind: what people call such a mask.
    """

    value: Affine | None
    node: fx.Node | None
    implied: bool = False
    reflexive: bool = False
    kind: str | None = None


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


Value = Affine | Floored | Condition | Choice | None


def band_of(test: Test) -> Band | None:
    """The test as a bound on query - key, the dims -2 and -1."""
    if not isinstance(test.value, Affine) or not isinstance(test.value.constant, int):
        return None
    match dict(test.value.coefficients):
        case {-2: 1, -1: -1, **rest} if not rest:
            return Band(lower=-test.value.constant)
        case {-2: -1, -1: 1, **rest} if not rest:
            return Band(upper=test.value.constant)
    return None


def sees_itself(condition: Condition) -> bool:
    """Whether every query sees the key at its own position, and that is proved."""
    return not condition.never and all(map(_holds_at_itself, condition.tests))


def _holds_at_itself(test: Test) -> bool:
    band = band_of(test)
    return test.reflexive or test.implied or (
        band is not None and band.relation(0, 0) == "full"
    )


def hull(conditions: list[Condition]) -> Band:
    """The band outside of which none of the conditions holds."""
    bands = []
    for condition in conditions:
        band = Band()
        for test in condition.tests:
            band &= band_of(test) or Band()
        bands.append(band)
    lowers, uppers = [band.lower for band in bands], [band.upper for band in bands]
    return Band(
        None if None in lowers else min(lower for lower in lowers if lower is not None),
        None if None in uppers else max(upper for upper in uppers if upper is not None),
    )


def implied(band: Band) -> tuple[Test, ...]:
    """A band as tests that follow from others."""
    tests = []
    if band.lower is not None:
        tests.append(Test(Affine.of({-2: 1, -1: -1}, -band.lower), None, implied=True))
    if band.upper is not None:
        tests.append(Test(Affine.of({-2: -1, -1: 1}, band.upper), None, implied=True))
    return tuple(tests)
