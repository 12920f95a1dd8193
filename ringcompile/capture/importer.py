"""From torch's exported graph to ours: sizes as expressions, nodes typed, each with its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ringcompile.capture.flat_call import FlatCall, own_name
from ringcompile.capture.source_lines import location_of
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import map_values
from ringcompile.ir.program import Input, Program, Weight, WeightSource
from ringcompile.ir.torch_sizes import from_torch, real
from ringcompile.ir.types import TensorType

# What torch checks of sizes at run time; shapes are checked where the program starts.
_ASSERTIONS = frozenset({
    "aten._assert_scalar.default", "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
})
_CAST = torch.ops.aten._to_copy.default


@dataclass
class Importer:
    """Copies an exported graph into ours: sympy sizes for SymInts, each node typed and located."""

    exported: ExportedProgram
    call: FlatCall
    symbols: Mapping[str, sympy.Symbol]
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.inputs: list[Input] = []
        self.placeholders: dict[str, str] = {}
        self.weights: dict[str, Weight] = {}

    def program(self, name: str) -> Program:
        """The graph as a program, without a range of lengths."""
        signature = self.exported.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
        return Program(
            graph=self.graph,
            inputs=tuple(self.inputs),
            placeholders=self.placeholders,
            weights=self.weights,
            output_structure=self.call.structure,
            name=name,
            source=self._source(),
            passes=("capture",),
        )

    def _placeholder(self, node: fx.Node, spec: Any) -> None:
        value = node.meta["val"]
        if spec.kind is InputKind.USER_INPUT and not torch.is_tensor(value):
            self.env[node] = value if not isinstance(value, torch.SymInt) else None
            return
        new = self.graph.placeholder(node.name)
        new.meta["type"] = self._type(value)
        self.env[node] = new
        if spec.kind is InputKind.USER_INPUT:
            values = self.values.get(node.name)
            self.inputs.append(Input(node.name, new.meta["type"], values=values))
            self.placeholders[new.name] = node.name
        else:
            self.weights[new.name] = Weight(
                own_name(spec.target), value.dtype, tuple(int(size) for size in value.shape)
            )

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        location = location_of(node)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return  # read where it is used, from its value
        if str(node.target) in _ASSERTIONS:
            return
        try:
            target = node.target
            args, kwargs = map_values((node.args, node.kwargs), self._argument)
            if target is _CAST and not isinstance(args[0], fx.Node):  # torch.vmap casts numbers
                target, args = torch.ops.aten.full.default, ((), args[0])
            new = self.graph.create_node("call_function", target, args, kwargs, node.name)
            new.meta["loc"] = location
            if value is not None:
                new.meta["type"] = self._type(value)
        except RingCompileError as error:
            raise RingCompileError(
                error.message, hint=error.hint, location=location, node=node.name
            ) from None
        self.env[node] = new

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value in self.env:
            return self.env[value]
        return self._number(value.meta["val"])

    def _number(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return from_torch(value.node.expr, self.symbols)
        if isinstance(value, torch.SymFloat):
            return real(value.node.expr, self.symbols)
        if isinstance(value, torch.SymBool):
            raise RingCompileError("a value depends on whether a length satisfies a condition")
        return value

    def _type(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(self._type(v) for v in value)
        shape = tuple(
            self._number(size) if isinstance(size, torch.SymInt) else int(size)
            for size in value.shape
        )
        return TensorType.whole(value.dtype, shape)

    def _output(self, node: fx.Node) -> None:
        written = len(self.exported.graph_signature.buffers_to_mutate)  # these come first
        flat = [self._argument(value) for value in node.args[0][written:]]  # type: ignore
        if self.exported.call_spec.out_spec.num_leaves != len(flat):
            raise RingCompileError(
                "the model changes its own state or its inputs while it runs",
                hint="inference must not change state: turn caches and running states off",
            )
        self.graph.output(tuple(flat))

    def _source(self) -> WeightSource:
        model = self.call.model
        held = {**dict(model.named_parameters(remove_duplicate=False)),
                **dict(model.named_buffers(remove_duplicate=False)),
                **{own_name(name): value for name, value in self.exported.constants.items()}}
        return lambda name: held[name].detach()


def check_writes(exported: ExportedProgram) -> None:
    """Refuse state: what a call writes may be read in the next one.

    A buffer of which no call reads what was in it before is none: Hugging Face's rotary
    embeddings write the frequencies for the length at hand to one, and read them from there.

    Raises:
        RingCompileError: with the name of what is changed.
    """
    signature = exported.graph_signature
    read = {
        signature.inputs_to_buffers[node.name]
        for node in exported.graph.nodes
        if node.users and node.name in signature.inputs_to_buffers
    }
    changed = [name for name in signature.buffers_to_mutate.values() if name in read]
    changed += signature.user_inputs_to_mutate.values()
    changed += getattr(signature, "parameters_to_mutate", {}).values()
    if changed:
        raise RingCompileError(
            f"the model changes '{own_name(changed[0])}' while it runs; inference must not "
            "change state",
            hint="call model.eval(), and turn caches off; where only the first call changes "
            "something, call the model once before it is captured",
        )
