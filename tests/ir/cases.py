"""A case for every row of the rule table."""

from __future__ import annotations

from tests.ir import (
    cases_contraction,
    cases_dims,
    cases_indexing,
    cases_pointwise,
    cases_shapes,
    cases_spatial,
    cases_whole,
)
from tests.ir.case import Case

CASES: dict[str, Case] = {
    **cases_pointwise.CASES,
    **cases_dims.CASES,
    **cases_shapes.CASES,
    **cases_whole.CASES,
    **cases_indexing.CASES,
    **cases_contraction.CASES,
    **cases_spatial.CASES,
}
