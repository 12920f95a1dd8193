"""What a pass is, how passes run, and the builder that they write new graphs with."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import fx

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.calls import append
from ringcompile.ir.fused import MARK
from ringcompile.ir.operands import attention_operands, lost_operand
from ringcompile.ir.program import Program
from ringcompile.ir.types import ValueType
from ringcompile.ir.verifier import verify_program
from ringcompile.progress import counted


class Pass(ABC):
    """One rewrite of a program. Subclasses are frozen dataclasses; their fields are the options."""

    name: ClassVar[str]
    # Whether it may write an operand of attention in another form: a mask as the band it means.
    reads_masks: ClassVar[bool] = False

    @abstractmethod
    def run(self, program: Program) -> Program:
        """The rewritten program; the argument stays as it was."""

    def __str__(self) -> str:
        options = (
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)  # type: ignore[arg-type]
            if f.repr
        )
        return f"{self.name}{{{', '.join(options)}}}"


@dataclass
class Pipeline:
    """Passes in order; behind each the program is verified, and no attention has lost an operand.

    Attributes:
        observe: called behind every pass with the pass, the program and the seconds it took.
    """

    passes: Sequence[Pass]
    observe: Callable[[Pass, Program, float], None] | None = None
    verify: bool = True

    def run(self, program: Program) -> Program:
        """Run all passes.

        Raises:
            RingCompileError: the program cannot be compiled; what a pass left invalid is an
                AssertionError that names the pass.
        """
        given = attention_operands(program) if self.verify else {}
        for step in counted("passes", self.passes):
            start = time.perf_counter()
            program = step.run(program)
            program = program.with_graph(program.graph, passes=(*program.passes, step.name))
            if self.verify:
                verify_program(program)
                before, given = given, attention_operands(program)
                lost = None if step.reads_masks else lost_operand(before, given)
                assert lost is None, f"after {' -> '.join(program.passes)}: {lost}"
            if self.observe is not None:
                self.observe(step, program, time.perf_counter() - start)
        return program


# What a copied node keeps; `why_not` and `mask_kind` are texts for refusals and reports.
_CARRIED = ("type", "loc", "why", "why_not", "mask_kind", "stage", MARK)


@dataclass
class Builder:
    """Writes a new graph node by node from an old one.

    Attributes:
        graph: the new graph.
        env: old node -> what stands for it in the new graph.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, Any] = field(default_factory=dict)
    _location: SourceLocation = field(default_factory=SourceLocation)

    def at(self, node: fx.Node) -> None:
        """Nodes made from here on come from this node's source line."""
        self._location = node.meta.get("loc", SourceLocation())

    def mapped(self, value: Any) -> Any:
        """Arguments of the old graph, in terms of the new one."""
        return fx.map_arg(value, self.env.__getitem__)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        type_: ValueType,
        *,
        name: str | None = None,
        why: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Append a call with its type; the location is the one set by `at`."""
        node = append(self.graph, "call_function", target, args, kwargs, name)
        node.meta.update(type=type_, loc=self._location)
        if why:
            node.meta["why"] = why
        return node

    def placeholder(self, name: str, type_: ValueType) -> fx.Node:
        """Append a weight or an input; it has a type and no source line."""
        node = self.graph.placeholder(name)
        node.meta["type"] = type_
        return node

    def copy(self, node: fx.Node, arguments: tuple[Any, Any] | None = None) -> fx.Node:
        """Append a node as it was, over mapped operands, or with other args and kwargs."""
        args, kwargs = arguments or self.mapped((node.args, node.kwargs))
        new = append(self.graph, node.op, node.target, args, kwargs, node.name)
        new.meta.update({k: node.meta[k] for k in _CARRIED if k in node.meta})
        return new

    def output(self, nodes: tuple[fx.Node, ...]) -> None:
        """Append the return of these nodes of the new graph."""
        self.graph.output(tuple(nodes))


def refuse(node: fx.Node, error: RingCompileError) -> RingCompileError:
    """The error with the node's name and line added, where it has none yet."""
    return RingCompileError(
        error.message,
        hint=error.hint,
        location=error.location or node.meta.get("loc"),
        node=error.node or node.name,
    )
