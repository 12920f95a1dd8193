"""Holding a row against the op itself: each rank, from its shares, computes its piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ringcompile.ir.calls import Call, replace_operands, with_argument
from ringcompile.ir.expr import equal, product
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import results_of
from ringcompile.ir.rules import ConflictError, Rule
from ringcompile.ir.types import TensorType
from ringcompile.ops.bodies import body_of
from tests.ir.case import Arguments, Case
from tests.ir.draws import Draws
from tests.ir.sharding import World, single

_CLOSE = {torch.float32: 1e-4}


@dataclass(frozen=True)
class Example:
    """One call of an op: its operands, what it gives on one device, and where it is tried.

    Attributes:
        call: the node of the call, its operands and results typed as whole.
        operands: the tensors it reads.
        results: what it gives.
    """

    case: Case
    world: World
    call: Call
    operands: list[Tensor]
    results: list[Tensor]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(x.shape) for x in self.operands]

    def __str__(self) -> str:
        shapes = ", ".join(map(str, self.shapes))
        return f"{self.call.node.format_node()} of {shapes} on {self.world}"


def target_of(name: str) -> Any:
    """The operator of a row."""
    namespace, short, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), short), overload)


def example(name: str, case: Case, draws: Draws) -> Example:
    """A call of that op, drawn."""
    args, kwargs = case.make(draws)
    results = _tensors(body_of(target_of(name))(*args, **kwargs))
    types = tuple(map(draws.world.type_of, results))
    call = Call(_node(target_of(name), (args, kwargs), draws.world))
    call.node.meta["type"] = types if len(types) > 1 else types[0]
    return Example(case, draws.world, call, _tensors((args, kwargs)), results)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _node(target: Any, arguments: Arguments, world: World) -> fx.Node:
    graph = fx.Graph()

    def placeholder(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        node = graph.placeholder("x")
        node.meta["type"] = world.type_of(leaf)
        return node

    args, kwargs = pytree.tree_map(placeholder, arguments)
    return graph.call_function(target, args, kwargs)


# -- the property ----------------------------------------------------------------------------------

def check_forward(example: Example, rule: Rule, layouts: Sequence[Layout]) -> None:
    """From operands in these layouts: what the row asks for gives what it says."""
    world = example.world
    try:
        placement = rule.forward(example.call, layouts, world.axis_sizes)
    except ConflictError:
        used = Counter(axis for layout in layouts for axis in set(layout.axes))
        assert max(used.values(), default=0) > 1, f"a conflict with nothing: {example}, {layouts}"
        return
    run_shares(example, rule, placement.operands, placement.output)


def check_backward(example: Example, rule: Rule, wanted: Layout) -> None:
    """For a wanted result: the row's operands give it, or the row says that it cannot tell."""
    operands = rule.backward(example.call, wanted, example.world.axis_sizes)
    if operands is not None:
        run_shares(example, rule, operands, wanted)


def run_shares(
    example: Example, rule: Rule, layouts: Sequence[Layout], output: Layout
) -> None:
    """Run the call on every rank's shares, and compare with its share of the results."""
    world, where = example.world, f"{example}\n{[str(x) for x in layouts]} -> {output}"
    for x, layout in zip(example.operands, layouts, strict=True):
        _check_layout(world.type_of(x), layout, where)
    result = results_of(example.call.node)[0]
    _check_layout(result, output, where)
    on_one_device = output.is_whole and all(layout.is_whole for layout in layouts)
    if on_one_device or example.case.rewritten(example.call, output):
        return
    for here in world.ranks():
        shares = [
            world.poisoned(x, layout, here)
            for x, layout in zip(example.operands, layouts, strict=True)
        ]
        try:
            found = _run(example, rule, shares, result.with_layout(output))
        except (RuntimeError, IndexError) as error:
            raise AssertionError(f"{here} cannot run it: {where}") from error
        assert len(found) == len(example.results), where
        for share, whole in zip(found, example.results, strict=True):
            _compare(example, share, whole, output, here, where)


def _check_layout(type_: TensorType, layout: Layout, where: str) -> None:
    assert len(layout.dims) == len(type_.shape), f"{layout} is of another rank: {where}"
    assert len(set(layout.axes)) == len(layout.axes), f"{layout} has an axis twice: {where}"
    for size, dim in zip(type_.shape, layout.dims, strict=True):
        assert not dim or equal(product(atom.size for atom in dim), size), (
            f"{layout} is not one of {type_}: {where}"
        )


def _run(
    example: Example, rule: Rule, shares: list[Tensor], type_: TensorType
) -> list[Tensor]:
    call = example.call
    args, kwargs = replace_operands(call.node, shares)  # type: ignore[arg-type]
    if rule.shape_argument is not None:
        shape = example.world.local_shape(type_)
        args, kwargs = with_argument(call.node, args, dict(kwargs), rule.shape_argument, shape)
    return _tensors(body_of(call.target)(*args, **kwargs))


def _compare(
    example: Example, share: Tensor, whole: Tensor, layout: Layout, here: dict[str, int], where: str
) -> None:
    if layout.is_whole:  # that of the first result; the others may have another rank
        layout = Layout.whole(whole.dim())
    expected = example.world.share(whole, layout, here)
    assert share.shape == expected.shape, f"{here} has {tuple(share.shape)}: {where}"
    token = example.world.is_token(whole.shape, layout, here).expand(share.shape)
    close = 0.0 if example.case.exact else _CLOSE.get(whole.dtype, 1e-9)
    torch.testing.assert_close(
        share[token], expected[token], rtol=close, atol=close, equal_nan=True,
        msg=lambda text: f"{here}: {text}\n{where}",
    )


# -- usefulness ------------------------------------------------------------------------------------

def free_splits(example: Example) -> Iterator[list[Layout]]:
    """The operands' layouts with one split that must pass, each way the dim can be split."""
    world = example.world
    free = example.case.free(example.call)
    whole = [Layout.whole(len(shape)) for shape in example.shapes]
    for axis, _ in world.mesh.axes:
        for i, shape in enumerate(example.shapes):
            for dim, made in world.splits(shape, axis):
                if (i, dim) in free:
                    yield [*whole[:i], single(len(shape), dim, made), *whole[i + 1 :]]


def check_kept(example: Example, rule: Rule, layouts: Sequence[Layout]) -> None:
    """The one split among the operands passes, and can be asked for."""
    axis_sizes = example.world.axis_sizes
    placement = rule.forward(example.call, layouts, axis_sizes)
    where = f"{example}\n{[str(layout) for layout in layouts]}"
    for have, layout in zip(layouts, placement.operands, strict=True):
        assert have.is_whole or have == layout, f"a split is not kept: {where}"
    assert not placement.output.is_whole, f"a split is lost: {where}"
    wanted = rule.backward(example.call, placement.output, axis_sizes)
    assert wanted == placement.operands, f"a split cannot be asked for: {where}"
