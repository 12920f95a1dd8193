"""What each op needs of its operands' layouts and what layout comes out: a table of rows."""

from ringcompile.ir.rules.base import ConflictError, FactorRule, Factors, Placement, Rule, ViewRule
from ringcompile.ir.rules.table import RULES, all_whole, find_rule

__all__ = [
    "RULES",
    "ConflictError",
    "FactorRule",
    "Factors",
    "Placement",
    "Rule",
    "ViewRule",
    "all_whole",
    "find_rule",
]
