"""Reads the ops that compute a mask: an abstract value for each node.

The analysis proves, it does not sample: a node is either understood from the ops that compute it,
or opaque.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.program import Program
from ringcompile.passes.masks import arithmetic, dims, logic
from ringcompile.passes.masks.constants import buffer_value
from ringcompile.passes.masks.steps import Step, is_difference, number_value
from ringcompile.passes.masks.values import Affine, Choice, Condition, Test, Value


@dataclass
class Analysis:
    """Abstract values of nodes, computed on demand.

    Attributes:
        program: whose buffers may be read; without it they are opaque.
        values: what is known already.
    """

    program: Program | None = None
    values: dict[fx.Node, Value] = field(default_factory=dict)

    def of(self, node: Any) -> Value:
        """The value of a node, or of a number standing in its place."""
        if not isinstance(node, fx.Node):
            return number_value(node)
        if node not in self.values:
            self.values[node] = None
            self.values[node] = self._compute(node)
        return self.values[node]

    def condition(self, node: fx.Node) -> Condition:
        """A bool node as a condition; one opaque test where it is not understood."""
        value = self.of(node)
        return value if isinstance(value, Condition) else Condition((Test(None, node),))

    def number(self, value: Any) -> float | None:
        """The number a scalar, or a tensor that is the same everywhere, holds."""
        if isinstance(value, int | float):
            return float(value)
        known = self.of(value)
        if isinstance(known, Choice) and known.condition.constant is not None:
            return known.true if known.condition.constant else known.false
        return None

    def is_apart(self, node: fx.Node) -> bool:
        """Whether only the difference of two positions decides what a node holds."""
        value = self.of(node)
        if isinstance(value, Condition):
            return bool(value.tests) and all(
                test.value is not None and is_difference(test.value) for test in value.tests
            )
        return isinstance(value, Affine) and is_difference(value)

    def _compute(self, node: fx.Node) -> Value:
        if node.op == "placeholder" and self.program is not None:
            return buffer_value(self.program, node.name)
        if node.op != "call_function":
            return None
        name = target_name(node.target).removeprefix("aten.")
        step = _STEPS.get(name) or _STEPS.get(name.split(".")[0])
        return step(self, Call(node)) if step else None


_STEPS: dict[str, Step] = {
    "full": dims.full,
    "arange": dims.arange,
    "reshape": dims.reshape,
    "permute": dims.permute,
    "expand": dims.expand,
    "slice": dims.sliced,
    "select": dims.selected,
    "index": dims.indexed,
    "cumsum": arithmetic.cumsum,
    "diff": arithmetic.diff,
    "add": arithmetic.add(1),
    "sub": arithmetic.add(-1),
    "rsub": arithmetic.rsub,
    "mul": arithmetic.mul,
    "floor_divide": arithmetic.divide,
    "div.Tensor_mode": arithmetic.divide,
    **{name: logic.compare(name) for name in logic.COMPARE},
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), logic.both),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), logic.either),
    **dict.fromkeys(("bitwise_not", "logical_not"), logic.negation),
    "tril": logic.triangle(lower=True),
    "triu": logic.triangle(lower=False),
    "where": logic.where,
    "masked_fill": logic.masked_fill,
    "to": logic.cast,
}
