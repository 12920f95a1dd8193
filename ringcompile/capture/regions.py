"""Regions of a captured graph that torch keeps as graphs of their own, written into the graph.

`torch.autocast` inside a forward, `torch.vmap` and checkpoints are not ops: their meaning is what
they make of the ops inside. The graph is traced once more with that meaning: the
casts of an autocast region become casts in the graph, at the ops that autocast casts for. Control
flow that depends on data is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

from ringcompile.capture.composite_ops import decomposed
from ringcompile.capture.source_lines import location_of
from ringcompile.errors import RingCompileError

_AUTOCAST = "wrap_with_autocast"
# Regions that compute what their ops compute, once, where they stand.
_INLINED = (
    _AUTOCAST, "tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap",
)  # fmt: skip
# What else there is in torch, by name: as the user writes it, and what to write instead.
REFUSED = {
    "cond": ("torch.cond", "compute both branches and choose with torch.where"),
    "while_loop": ("while_loop", "write a Python loop with a fixed number of steps"),
    "map_impl": ("map", "apply the function to the whole tensor, or use torch.vmap"),
    "scan": ("scan", "use torch.cumsum or associative_scan"),
}  # fmt: skip
_GENERIC_HINT = "write this part with ordinary tensor operations"


class _Autocast(NamedTuple):
    """The arguments of `torch.autocast`."""

    device: str
    dtype: torch.dtype | None
    enabled: bool

    @property
    def key(self) -> str:
        """The dispatch key under which autocast has its ops."""
        return f"Autocast{self.device.upper()}"


def written_out(exported: ExportedProgram) -> ExportedProgram:
    """The same program without regions, and without ops that write in place.

    No op is taken apart.

    Raises:
        RingCompileError: a region that cannot be written out, at its line.
    """
    calls = list(_calls(exported.graph_module))
    for node, _ in calls:
        _check(node)
    if not any(_needs_another_trace(node) for node, _ in calls):
        return exported
    for node, autocast in calls:
        if autocast is not None and _casts_inside(node, autocast):
            name = str(node.target).split(".")[1]
            raise RingCompileError(
                f"{name} is called under torch.autocast, which would cast the matmuls inside it",
                hint=f"write it with torch.matmul, or turn autocast off around it and cast what "
                f"{name} takes",
                location=location_of(node), node=node.name,
            )
    _run_node_by_node(exported.graph_module)
    return decomposed(exported, {})


def refusal(name: str) -> RingCompileError:
    """What is said of a higher-order op, without its place."""
    text, hint = REFUSED.get(name, (f"the higher-order op '{name}'", _GENERIC_HINT))
    return RingCompileError(
        f"{text} cannot be captured, because a compiled program has no control flow", hint=hint
    )


def _calls(
    graph_module: fx.GraphModule, autocast: _Autocast | None = None
) -> Iterator[tuple[fx.Node, _Autocast | None]]:
    """All calls, those in regions too, each with the autocast that is on around it."""
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        yield node, autocast
        inside = _Autocast(*node.args[:3]) if _name(node) == _AUTOCAST else autocast
        for region in _regions(node):
            yield from _calls(region, inside if inside and inside.enabled else None)


def _regions(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that a higher-order op calls."""
    for argument in node.all_input_nodes if isinstance(node.target, HigherOrderOperator) else ():
        if argument.op == "get_attr":
            found = getattr(argument.graph.owning_module, str(argument.target))
            if isinstance(found, fx.GraphModule):
                yield found


def _name(node: fx.Node) -> str:
    """The name of a higher-order op; empty of any other."""
    return node.target.name() if isinstance(node.target, HigherOrderOperator) else ""


def _check(node: fx.Node) -> None:
    name = _name(node)
    if name and name not in _INLINED:
        error = refusal(name)
        raise RingCompileError(
            error.message, hint=error.hint, location=location_of(node), node=node.name
        )


def _needs_another_trace(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    of_functorch = getattr(node.target, "__module__", "") == "torch._functorch.predispatch"
    return bool(_name(node)) or of_functorch


def _casts_inside(node: fx.Node, autocast: _Autocast) -> bool:
    """Whether an op is composed of others that autocast casts for, and is none itself."""
    op = node.target
    if not isinstance(op, OpOverload) or not op._can_decompose():
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), autocast.key):
        return False
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    inside = _traced(op, args, kwargs, autocast)
    return inside is None or inside != _traced(op, args, kwargs, autocast._replace(enabled=False))


def _traced(op: Any, args: Any, kwargs: Any, autocast: _Autocast) -> list[str] | None:
    """The ops that a call of a composite op comes down to; None where it needs casts to run."""
    try:
        with _Recorded() as recorded, torch.autocast(*autocast):
            op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    except RuntimeError:
        return None
    return recorded.ops


class _Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


class _Region(nn.Module):
    """Runs a graph node by node, so that what it is traced to keeps each node's line and layer."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, *args: Any) -> Any:
        return fx.Interpreter(self.graph_module).run(*args)


def _run_node_by_node(graph_module: fx.GraphModule) -> None:
    for name, inner in list(graph_module.named_children()):
        if isinstance(inner, fx.GraphModule):
            _run_node_by_node(inner)
            setattr(graph_module, name, _Region(inner))
