"""What ranks are compared with: the model itself, or the program for one device that was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.numerics.lengths import COMPARISONS
from ringcompile.runtime.executor import Executor, run_alone
from ringcompile.runtime.runner import read_weights

Inputs = Mapping[str, torch.Tensor]


@dataclass
class Reference:
    """The program for one device, run on whole inputs.

    Attributes:
        program: without a mesh.
        outcomes: for every comparison of whole numbers which results it had so far.
    """

    program: Program
    outcomes: dict[fx.Node, set[bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outcomes = {
            node: set() for node in self.program.graph.nodes if _compares_counts(node)
        }

    @property
    def one_sided(self) -> list[fx.Node]:
        """Comparisons that always had the same result: a threshold that was never reached."""
        return [node for node, seen in self.outcomes.items() if len(seen) < 2]

    def run(self, inputs: Inputs, source: WeightSource | None) -> Any:
        """The outputs, nested."""
        program = self.program
        executor = Executor(program, program.bindings(dict(inputs)), watch=self._watch)
        values = read_weights(program, source)
        values.update({p: inputs[name] for p, name in program.placeholders.items()})
        return program.output_structure.build(run_alone(executor, values))

    def _watch(
        self, node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
    ) -> Any:
        result = function(*args, **kwargs)
        if len(self.outcomes.get(node, (True, False))) < 2 and result.numel():
            self.outcomes[node] |= {bool(result.any()), bool(result.all())}
        return result


@dataclass(frozen=True)
class Eager:
    """The user's own module."""

    module: nn.Module

    def run(self, inputs: Inputs, source: WeightSource | None) -> Any:
        """The outputs as the module returns them; it has weights of its own."""
        return self.module(**inputs)


def _compares_counts(node: fx.Node) -> bool:
    """Whether a node compares whole numbers: counts, ranks in an order, distances, positions.

    Whether one is negative at all is no threshold that a longer sequence would reach.
    """
    limit = node.args[1] if len(node.args) > 1 else 0
    if str(node.target) not in COMPARISONS or (isinstance(limit, int) and limit <= 0):
        return False
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    return all(not type_of(operand).dtype.is_floating_point for operand in operands)
