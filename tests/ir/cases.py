"""A case for every row of the rule table."""

from __future__ import annotations

from tests.ir import cases_contraction, cases_dims, cases_indexing, cases_pointwise, cases_spatial
from tests.ir.case import Case

CASES: dict[str, Case] = {
    **cases_pointwise.CASES,
    **cases_dims.CASES,
    **cases_indexing.CASES,
    **cases_contraction.CASES,
    **cases_spatial.CASES,
}
