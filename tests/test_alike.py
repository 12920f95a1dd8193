"""What is wrong on all ranks alike is found by `verify --numerics`."""

from __future__ import annotations

from itertools import islice

import pytest

from tests import alike
from tests.test_mutants import ARTIFACTS

AT_LEAST, MANY, KINDS = 0.95, 300, 40


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_sample_of_mutants_that_are_alike_is_found(name: str) -> None:
    real = (one for one in alike.trials(step=7, start=6, names=[name]) if not one.void)
    least = 1 if name == "experts" else 2  # a check of experts takes as long as all others
    sample = list(islice(real, least))
    assert len(sample) == least
    assert [one for one in sample if not one.said] == []


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_of_all_mutants_that_are_alike_95_percent_are_found() -> None:
    """At least 300, of 40 kinds, on four artifacts."""
    done = list(alike.trials())
    report = alike.summary(done)
    print(report)
    real = [one for one in done if not one.void]
    assert {one.name for one in real} == set(ARTIFACTS)
    assert len(real) >= MANY, report
    assert len({one.kind for one in real}) >= KINDS, report
    assert sum(bool(one.said) for one in real) >= AT_LEAST * len(real), report
