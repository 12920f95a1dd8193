"""From an nn.Module to a Program: torch.export, then our own graph without torch's symbols.

Capture is non-strict and runs no decomposition, so that `linear` and attention stay whole. Lengths
stay symbolic. Weights become names: no data is copied or even read.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from ringcompile.capture import huggingface
from ringcompile.capture.guards import allowed_lengths
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.calls import map_values
from ringcompile.ir.expr import SEQUENCE, depends_on_data, from_torch, symbol, unbacked
from ringcompile.ir.program import Input, Program, Structure, Weight, WeightSource
from ringcompile.ir.types import TensorType

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
# What torch checks of sizes at run time; shapes are checked where the program starts.
_ASSERTIONS = frozenset({
    "aten._assert_scalar.default", "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
})
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> Program:
    """Capture a model for any sequence length.

    Args:
        model: an ordinary module, in eval mode; its parameters may be fake tensors.
        args: example inputs by position. The length of dim 1 of the first tensor is the sequence
            length; every other input dim (but dim 0) of that size is taken to be one too.
        kwargs: example inputs by name; their tensors come behind those of `args`.
        name: what to call the program; the module's class by default.

    Raises:
        RingCompileError: the model cannot be captured: control flow or sizes that depend on data, a
            length that the code fixes, state that a call would change.
    """
    # Strides would be taken for a property of the model, and fix its length.
    dense: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, torch.Tensor.contiguous, (args, dict(kwargs or {}))
    )
    return _capture(model, *dense, name or type(model).__name__)


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> Program:
    length = _example_length(args, kwargs)
    notes = huggingface.caveats(model, kwargs)
    with torch.no_grad(), _without_logs(), _unchanged(model), huggingface.prepared(model):
        try:
            exported = _export(model, args, kwargs, _dynamic_shapes(model, args, kwargs, length))
            lengths = _allowed_lengths(exported, length)
        except _FixedLengthError as error:
            exported = _export(model, args, kwargs, _dynamic_shapes(model, args, kwargs, None))
            lengths = _length_range(exported)
            where = f"{error.location.short}: " if error.location else ""
            notes = (*notes, f"{where}{error.message}, {length}")
        exported = _functional(exported)
    program = _Importer(exported, model).program(name)
    return program.with_graph(program.graph, notes=notes, length_range=lengths)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore attributes that modules set while they run: what was traced would stay in them."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*assigned during export")
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextlib.contextmanager
def _without_casts_of_modules() -> Iterator[None]:
    """`self.classifier.to(dtype)` inside a forward, to the dtype that it has, changes nothing.

    It would exchange parameters while they are traced, which cannot be captured.
    """
    original: Any = nn.Module._apply

    def apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        if all(function(p).dtype == p.dtype for p in module.parameters()):
            return module
        return original(module, function, recurse)

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """What torch logs on the way to an error is in the error that becomes ours."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _example_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The length of the example sequence; None where the first input holds no tokens."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
    if not tensors or tensors[0].dim() < 2:
        raise RingCompileError(
            "the first example input must be a tensor with the sequence as its dim 1",
            hint="pass for example token ids of shape [batch, sequence]",
        )
    if tensors[0].dim() > 3:  # an image: how many tokens it becomes is the model's to say
        return None
    length = tensors[0].shape[1]
    if length < 2:
        raise RingCompileError(f"the example sequence has length {length}; use at least 2")
    return int(length)


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], length: int | None
) -> Any:
    def dims(leaf: Any) -> Any:
        if not torch.is_tensor(leaf) or length is None:
            return None
        found = {i: Dim.DYNAMIC for i, size in enumerate(leaf.shape) if i and size == length}
        if leaf.is_floating_point() and leaf.dim() == 3 and len(found) > 1:
            raise RingCompileError(
                f"the example length {length} is also a feature size: which dim is the sequence?",
                hint="choose an example length that no other size of the inputs equals",
            )
        return found

    # By argument name, whether it was passed by position or by keyword.
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return pytree.tree_map(dims, dict(bound.arguments))


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    printed = io.StringIO()  # torch prints the graph as far as it came before it raises
    try:
        with (
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed),
            _without_casts_of_modules(),
        ):
            exported = export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        print(printed.getvalue(), end="")
        return exported
    except RingCompileError:
        raise
    except Exception as error:  # torch.export raises many kinds; each becomes one of ours
        raise _explain(error) from error


class _FixedLengthError(RingCompileError):
    """The model can be captured for the length of the example only."""


def _allowed_lengths(exported: ExportedProgram, example: int | None) -> tuple[int, int | None]:
    """The lengths that the captured code is right for; where there is no example, any."""
    found = _length_range(exported)
    if example is None:
        return found
    allowed = allowed_lengths(exported, example, *found)
    if allowed is None:
        raise _FixedLengthError(
            "the model's code fixes the sequence length to that of the example",
            hint="a size was turned into a number: torch.export kept "
            f"{'; '.join(exported._guards_code)[:200]}",
        )
    return allowed


def _length_range(exported: ExportedProgram) -> tuple[int, int | None]:
    """What torch says of the sizes of inputs; sizes that data tell have ranges too."""
    low, high = 2, None
    for free, limits in exported.range_constraints.items():
        if not depends_on_data(unbacked(free.name)):
            low = max(low, int(limits.lower)) if limits.lower.is_Integer else low
            high = int(limits.upper) if limits.upper.is_Integer else None
    return low, high if high is None or high < 2**40 else None


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The same program without ops that write in place; no op is taken apart."""
    writes = any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        for node in exported.graph.nodes
    )
    if not writes:
        return exported
    with warnings.catch_warnings():  # torch's own use of what it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return exported.run_decompositions({})


def _explain(error: Exception) -> RingCompileError:
    """The user's line and a reason for an export failure."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, _HERE, "<")) and "/contextlib.py" not in
        frame.filename
    ]
    inside = [f for f in frames if "/ringcompile/compiler.py" not in f.filename]
    location = SourceLocation(inside[-1].filename, inside[-1].lineno or 0) if inside else None
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in text:
        return RingCompileError(
            "control flow or a size depends on the values of a tensor, not on shapes",
            hint="compute both ways and choose with torch.where, or keep the size fixed",
            location=location,
        )
    if "ConstraintViolation" in type(error).__name__ or "specialized" in text:
        return _FixedLengthError(
            "the model's code fixes the sequence length to that of the example",
            hint="use sizes taken from the inputs (x.shape[1]) instead of a constant",
            location=location,
        )
    if "not a known type" in text and "Cache" in first:
        return RingCompileError(
            "the model returns a cache of keys and values beside its tensors",
            hint="call it with use_cache=False",
        )
    return RingCompileError(
        f"torch.export cannot capture the model: {type(error).__name__}: {first[:300]}",
        location=location,
    )


@dataclass
class _Importer:
    """Copies an exported graph into ours: sympy sizes for SymInts, each node typed and located."""

    exported: ExportedProgram
    model: nn.Module

    def __post_init__(self) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.symbols = self._name_symbols()
        self.inputs: list[Input] = []
        self.placeholders: dict[str, str] = {}
        self.weights: dict[str, Weight] = {}

    def _name_symbols(self) -> dict[str, sympy.Symbol]:
        """Torch's symbols for input sizes: all were one length in the example, so all are `s`."""
        return {
            free.name: symbol(SEQUENCE)
            for node in self._user_inputs()
            for size in node.meta["val"].shape
            if isinstance(size, torch.SymInt)
            for free in size.node.expr.free_symbols
        }

    def _user_inputs(self) -> list[fx.Node]:
        names = {
            spec.arg.name: spec
            for spec in self.exported.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        }
        return [
            node
            for node in self.exported.graph.nodes
            if node.op == "placeholder" and node.name in names and torch.is_tensor(node.meta["val"])
        ]

    def program(self, name: str) -> Program:
        signature = self.exported.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            changed = [*signature.buffers_to_mutate.values(),
                       *signature.user_inputs_to_mutate.values()]
            raise RingCompileError(
                f"the model changes '{changed[0]}' while it runs; inference must not change state",
                hint="call model.eval(), and turn caches off",
            )
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                structure = self._output(node)
        return Program(
            graph=self.graph,
            inputs=tuple(self.inputs),
            placeholders=self.placeholders,
            weights=self.weights,
            output_structure=structure,
            length_range=_length_range(self.exported),
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
            self.inputs.append(Input(node.name, new.meta["type"]))
            self.placeholders[new.name] = node.name
        else:
            self.weights[new.name] = Weight(
                spec.target, value.dtype, tuple(int(size) for size in value.shape)
            )

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        location = _location(node)
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return  # read where it is used, from its value
        if str(node.target) in _ASSERTIONS:
            return
        try:
            args, kwargs = map_values((node.args, node.kwargs), self._argument)
            new = self.graph.create_node("call_function", node.target, args, kwargs, node.name)
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
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return from_torch(value.node.expr, self.symbols)
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

    def _output(self, node: fx.Node) -> Structure:
        flat = [self._argument(value) for value in node.args[0]]  # type: ignore[union-attr]
        spec = self.exported.call_spec.out_spec
        if spec.num_leaves != len(flat):
            raise RingCompileError(
                "the model changes its own state or its inputs while it runs",
                hint="inference must not change state: turn caches and running states off",
            )
        structure = _structure(pytree.tree_unflatten(flat, spec))
        self.graph.output(tuple(value for value in flat if isinstance(value, fx.Node)))
        return structure

    def _source(self) -> WeightSource:
        held = {**dict(self.model.named_parameters(remove_duplicate=False)),
                **dict(self.model.named_buffers(remove_duplicate=False)),
                **self.exported.constants}
        return lambda name: held[name].detach()


def _structure(value: Any) -> Structure:
    """The nesting of outputs; anything with keys counts as a dict."""
    if isinstance(value, fx.Node):
        return Structure("tensor")
    if value is None:
        return Structure("none")
    if isinstance(value, Mapping):
        return Structure("dict", tuple(value), tuple(map(_structure, value.values())))
    if isinstance(value, tuple | list):
        kind = "list" if isinstance(value, list) else "tuple"
        return Structure(kind, (), tuple(map(_structure, value)))
    raise RingCompileError(
        f"the model returns a {type(value).__name__} beside its tensors",
        hint="return tensors, or tuples, lists and dicts of them",
    )


def _location(node: fx.Node) -> SourceLocation:
    """The last frame of the user's code, and the innermost module's path."""
    frames = [
        (file, int(line))
        for file, line in _FRAME.findall(node.meta.get("stack_trace") or "")
        if not file.startswith((_TORCH, _HERE))
    ]
    file, line = frames[-1] if frames else ("", 0)
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return SourceLocation(file, line, modules[-1][0] if modules else "")


@contextlib.contextmanager
def fake_weights() -> Any:
    """Build a model whose parameters have shapes but no memory (buffers stay real)."""
    original = nn.Module.register_parameter
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            with mode:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield mode
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
