"""What happens to scores between q k^T and the softmax: the steps, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ringcompile.ir.calls import aten_name
from ringcompile.ir.expr import Size
from ringcompile.passes.contraction import Contraction


class NotUnderstoodError(Exception):
    """Why this is not an attention that has an op of its own; the text is for the user."""


@dataclass(frozen=True)
class Scale:
    """Scores times, or divided by, a number, a length, or a tensor that all keys share."""

    factor: float | Size | fx.Node
    divide: bool = False


@dataclass(frozen=True)
class Bend:
    """Tanh of the scores: a soft cap, with the numbers before and after it."""


@dataclass(frozen=True)
class Bias:
    """A tensor added to scores of the leading sizes `lead`, or taken from them."""

    node: fx.Node
    lead: tuple[Size, ...]
    sign: int = 1


@dataclass(frozen=True)
class Fill:
    """A number put in place of the scores where `node` is true (or false)."""

    node: fx.Node
    lead: tuple[Size, ...]
    value: float
    where: bool = True


@dataclass(frozen=True)
class Sink:
    """A column beside the scores that takes weight and has no value."""

    node: fx.Node
    first: bool


Step = Scale | Bend | Bias | Fill | Sink


@dataclass
class HandWritten:
    """An attention found in a graph.

    Attributes:
        scores: q k^T, operands in that order.
        values: the weights times v, operands in that order.
        steps: from the scores to the softmax.
        shapes: of the scores on their way; they differ in leading dims only.
        zeroed: masks where weights are set to 0 behind the softmax.
    """

    scores: Contraction
    values: Contraction
    steps: list[Step]
    shapes: list[tuple[Size, ...]]
    zeroed: list[fx.Node]


@dataclass
class Scores:
    """What the steps from q k^T to the softmax come to."""

    scale: float = 1.0
    bend: float | None = None
    factors: list[Scale] = field(default_factory=list)
    biases: list[tuple[Bias, float]] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    sink: Sink | None = None

    def __post_init__(self) -> None:
        self.order: list[str] = []

    def take(self, step: Any) -> None:
        """One more step, behind those before it."""
        if self.sink is not None:
            raise NotUnderstoodError("its scores are changed after the attention sink is appended")
        match step:
            case Scale():
                self._scale(step)
            case Bend():
                if self.bend is not None or self.order:
                    raise NotUnderstoodError("its scores are masked before the soft cap")
                self.bend = 1.0
            case Bias():
                self.biases.append((step, float(step.sign)))
                self.order.append("bias")
            case Fill():
                self.fills.append(step)
                self.order.append("fill")
            case Sink():
                self.sink = step

    def _scale(self, step: Scale) -> None:
        if not isinstance(step.factor, float):
            if self.order or self.bend is not None:
                raise NotUnderstoodError("its scores are multiplied by a tensor after a mask or a "
                                         "soft cap")
            self.factors.append(step)
            return
        factor = 1 / step.factor if step.divide else step.factor
        if factor <= 0:
            raise NotUnderstoodError("its scores are scaled by a number that is not positive")
        if self.bend is None:
            self.scale *= factor
        else:
            self.bend *= factor
        self.biases = [(bias, number * factor) for bias, number in self.biases]
        self.fills = [Fill(f.node, f.lead, f.value * factor, f.where) for f in self.fills]


def short(node: fx.Node) -> str:
    """The name of an op without namespace and overload."""
    return aten_name(node.target)
