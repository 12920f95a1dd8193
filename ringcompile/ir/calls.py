"""Reading and rebuilding the arguments of graph calls by their schema names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import fx

from ringcompile.ir.expr import is_symbolic


@lru_cache(maxsize=4096)
def _signature(target: Any) -> tuple[tuple[str, bool, Any], ...]:
    """(name, keyword only, default) of each argument of an operator."""
    return tuple(
        (arg.name, arg.kwarg_only, arg.default_value if arg.has_default_value() else None)
        for arg in target._schema.arguments
    )


@lru_cache(maxsize=4096)
def _defaults(target: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an operator's arguments, and for each its default, None where it has none."""
    defaults = {name: default for name, _, default in _signature(target)}
    return tuple(defaults), defaults


@lru_cache(maxsize=4096)
def target_name(target: Any) -> str:
    """The text of a node's target, `aten.linear.default`; torch puts it together at every `str`."""
    return str(target)


@lru_cache(maxsize=4096)
def aten_name(target: Any) -> str:
    """`linear` of the target `aten.linear.default`: no overload, and no library if it is aten's."""
    return str(target).removeprefix("aten.").split(".")[0]


class Call:
    """A call node seen through its operator's schema; arguments at their default are filled in."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.target: Any = node.target
        names, defaults = _defaults(node.target)
        given = zip(names, node.args, strict=False)
        self.arguments: dict[str, Any] = {**defaults, **dict(given), **node.kwargs}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument that not every overload has; `default` where this one does not."""
        return self.arguments.get(name, default)

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes among the arguments, in order, one entry an occurrence."""
        return operands(self.node)


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes a node reads, in order, one entry an occurrence."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def replace_operands(node: fx.Node, new: list[fx.Node]) -> tuple[Any, Any]:
    """The args and kwargs of a node with its operands replaced, in order of occurrence."""
    supply: Iterator[fx.Node] = iter(new)
    return fx.map_arg((node.args, node.kwargs), lambda _: next(supply))


def with_argument(node: fx.Node, args: Any, kwargs: Any, name: str, value: Any) -> tuple[Any, Any]:
    """Args and kwargs with the named argument of the node's operator set."""
    for i, (argument, keyword_only, _) in enumerate(_signature(node.target)):
        if argument == name:
            if i < len(args) and not keyword_only:
                return (*args[:i], value, *args[i + 1 :]), kwargs
            return args, {**kwargs, name: value}
    raise AssertionError(f"{node.target} has no argument {name}")


def map_values(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of nested args; nodes are leaves too.

    What it returns may be changed, unlike what `fx.node.map_aggregate` does, which is quicker.
    """
    if isinstance(value, _SEQUENCES):
        return type(value)([map_values(v, change) for v in value])
    if isinstance(value, dict):
        return {key: map_values(v, change) for key, v in value.items()}
    return change(value)


def symbols_in(node: fx.Node) -> set[Any]:
    """The symbols in the expressions among a node's arguments."""
    found: set[Any] = set()

    def note(value: Any) -> Any:
        if is_symbolic(value):
            found.update(value.free_symbols)
        return value

    map_values((node.args, dict(node.kwargs)), note)
    return found


_SEQUENCES = (list, tuple)  # `list | tuple` would be made anew at every call


def append(
    graph: fx.Graph,
    op: str,
    target: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:
    """Append a node to a graph.

    `Graph.create_node` looks through all arguments for torch's SymInts, which takes three times as
    long as all else; graphs of ours hold none, so the arguments are set after it.
    """
    node = graph.create_node(op, target, name=name)
    # Past fx.Node.__setattr__, which enters the node into the graph's tables again.
    if args:
        object.__setattr__(node, "args", args)
    if kwargs:
        object.__setattr__(node, "kwargs", kwargs)
    return node
