"""The cross-rank check has no false alarms: random plans that compile fit together."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.random_plans import REFUSED, VALID, Outcome, checked, plan_of
from tests.support import some_fast

FEW, VALID_PLANS = range(16), 1000
# Of random plans only these are refused.
REFUSALS = (
    "more stages than the model has layers", "experts do not divide over ep=",
    "experts take a limited number of tokens of the whole batch",
)


def as_it_should(outcome: Outcome) -> bool:
    refused = outcome.kind == REFUSED and any(text in outcome.reason for text in REFUSALS)
    return outcome.kind == VALID or refused


@pytest.mark.parametrize("seed", some_fast(FEW, fast=lambda seed: seed % 2 == 0))
def test_a_random_plan_fits_together(seed: int) -> None:
    outcome = checked(seed)
    assert as_it_should(outcome), outcome


def test_a_seed_is_a_plan() -> None:
    assert plan_of(7) == plan_of(7)
    axes = Counter(part.partition("=")[0] for s in FEW for part in plan_of(s).parallel.split(","))
    assert min(axes.values()) >= 3
    assert len(axes) == 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_random_plans_fit_together() -> None:
    """And give the model's numbers in lock-step."""
    found: Counter[str] = Counter()
    seed = FEW.stop
    while found[VALID] < VALID_PLANS:
        outcome = checked(seed, numbers=True)
        assert as_it_should(outcome), outcome
        found[outcome.kind] += 1
        seed += 1
    assert found[REFUSED] < found[VALID] / 4
