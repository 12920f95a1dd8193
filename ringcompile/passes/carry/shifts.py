"""Convolutions and shifts in a program with a cache: what they last took in is state.

    r = redistribute(x)   [s]     x [s/time]  ->  r = recent(x, kept, before=2)   [s + 2]
    p = pad(r, (2, 0))    [s + 2]             ->  p = r, filled where there is no token yet
    y = conv1d(p, w)      [s]                 ->  y = conv1d(p, w)                [s]
    z = redistribute(y)   [s/time]            ->  z = y

The ops between are those of the whole sequence, run on a window: the new tokens, and as many before
them as the result looks back. Which entry belongs to which token is what `shift_forms` says; an
entry in front of token 0 is written as the model has it, whatever the window held there.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import (
    Call,
    map_values,
    operands,
    replace_operands,
    target_name,
    with_argument,
)
from ringcompile.ir.expr import equal, is_symbolic, simplify, spelled
from ringcompile.ir.nodes import error_at, layout_of, type_of
from ringcompile.ir.rules import Rule, find_rule
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.ops.slots import BLOCK
from ringcompile.passes.carried_dims import check_call
from ringcompile.passes.carry.context import NEW, Carrying
from ringcompile.passes.carry.front import filled, in_front, places
from ringcompile.passes.requests import REDISTRIBUTE
from ringcompile.passes.windows.shift_forms import (
    MOVES,
    NEEDS_ALL,
    front_of,
    joined,
    pads_of,
)
from ringcompile.passes.windows.shift_region import ShiftRegion, gathers_time, joined_along

aten = torch.ops.aten


class ShiftWriter(ShiftRegion):
    """Writes what lies between a value of all tokens and what is taken as one entry a token again.

    Args:
        into: the program; read as a whole before anything is written.
    """

    def __init__(self, into: Carrying) -> None:
        super().__init__(into.program)
        self.into, self.builder = into, into.builder
        self.windows: dict[tuple[fx.Node, int], fx.Node] = {}

    def write(self, node: fx.Node) -> fx.Node:
        """A node between, on the window that is wanted of it.

        Raises:
            RingCompileError: it would need tokens that come later, or nothing is known of a user.
        """
        for user in node.users:
            self._check(user, node)
        if gathers_time(node):
            return self._window(node)
        return _WRITERS.get(target_name(node.target), ShiftWriter._same)(self, node)

    def check(self, node: fx.Node) -> Rule | None:
        """The rule of an op that is done for every position that there may be.

        Raises:
            RingCompileError: as `check_call`; entries that are not their own token's are used.
        """
        if node not in self.everywhere:
            return check_call(node)
        for user in node.users:
            if user not in self.forms and not self.forms[node].one_a_token:
                raise _refusal(node, NEEDS_ALL)
        return find_rule(node.target)

    def leave(self, node: fx.Node) -> fx.Node:
        """A value as one with an entry for each new token."""
        return self._taken(node, 0, max(self.forms[node].offset, 0))

    def _check(self, user: fx.Node, node: fx.Node) -> None:
        if user in self.between:
            return
        # What gathers has no line of its own.
        at = user if gathers_time(node) else node
        if user in self.unknown:
            raise _refusal(user, self.unknown[user])
        if not self.forms[node].one_a_token:
            raise _refusal(at, NEEDS_ALL)

    def _window(self, node: fx.Node) -> fx.Node:
        """The new tokens, and those before that are wanted."""
        (source,) = operands(node)
        x, dim, before = self.builder.env[source], self.forms[node].dim, self.before[node]
        if layout_of(x) != self._type(node).layout:
            x = self.builder.call(
                REDISTRIBUTE, (x,), type_of(x).with_layout(self._type(node).layout),
                layout=str(self._type(node).layout), why=node.meta.get("why"),
            )
        if not before:
            return x
        type_ = type_of(x)
        size = min(self.into.capacity, before + BLOCK)
        kept = self.into.keep(
            f"recent_{node.name}", "recent",
            TensorType(type_.dtype, (*type_.shape[:dim], size, *type_.shape[dim + 1 :]),
                       type_.layout),
        )
        return self.builder.call(
            op("recent"), (x, kept, self.into.positions), self._type(node), name=node.name,
            dim=dim, before=before,
        )

    def _type(self, node: fx.Node, before: int | None = None) -> Any:
        """The type of a node on its window, or on another."""
        wide = self.before[node] if before is None else before
        found, dim = self.into.type(node.meta["type"]), self.forms[node].dim

        def windowed(type_: TensorType) -> TensorType:
            shape = (*type_.shape[:dim], simplify(NEW + wide), *type_.shape[dim + 1 :])
            return TensorType(type_.dtype, shape, type_.layout)

        return tuple(map(windowed, found)) if isinstance(found, tuple) else windowed(found)

    def _taken(self, node: fx.Node, before: int, delay: int = 0) -> fx.Node:
        """A value for the new tokens and so many before, all of them moved back by `delay`."""
        if node in self.between:
            x, have = self.builder.env[node], self.before[node]
        else:
            x, have = self._windowed(node, before + delay), before + delay
        if have == before and not delay:
            return x
        type_, dim = type_of(x), self.forms[node].dim
        shape = (*type_.shape[:dim], simplify(NEW + before), *type_.shape[dim + 1 :])
        start = have - before - delay
        return self.builder.call(
            aten.slice.Tensor, (x, dim, start, simplify(start + NEW + before), 1),
            TensorType(type_.dtype, shape, type_.layout),
        )

    def _windowed(self, node: fx.Node, before: int) -> fx.Node:
        """A window of a value that the program has for every position.

        What is made of inputs is made of a window of them, so that no more is computed.
        """
        if (node, before) not in self.windows:
            passes = any(n in self.forms for n in node.all_input_nodes) and not (
                target_name(node.target) in MOVES or joined_along(node, self.forms)
            )
            made = self._again(node, before) if passes else self._picked(node, before)
            self.windows[node, before] = made
        return self.windows[node, before]

    def _picked(self, node: fx.Node, before: int) -> fx.Node:
        """Entries by position; where the value has none, no result is made of what is picked.

        There is none in front of token 0, nor at the last positions of `x[:, :-1]`.
        """
        here, form = places(self.into, before), self.forms[node]
        size = type_of(self.builder.env[node]).shape[form.dim]
        if form.offset:
            here = self.builder.call(aten.add.Tensor, (here, form.offset), type_of(here))
        if before or form.offset < 0 or not equal(size, self.into.capacity + form.offset):
            here = self.builder.call(
                aten.clamp.default, (here, 0, simplify(size - 1)), type_of(here)
            )
        return self.builder.call(
            aten.index_select.default, (self.builder.env[node], form.dim, here),
            self._type(node, before), why="of the new tokens and those before",
        )

    def _again(self, node: fx.Node, before: int) -> fx.Node:
        """The same op on windows, of which some may have to be moved back."""
        wide = before + self.forms[node].reach
        args, kwargs = replace_operands(node, [
            self._taken(n, wide, self.late(node, n)) if n in self.forms else self.builder.env[n]
            for n in operands(node)
        ])
        new = self.builder.call(
            node.target, args, node.meta["type"], why=node.meta.get("why"), **kwargs
        )
        return self._typed(new, node, before)

    def _same(self, node: fx.Node) -> fx.Node:
        return self._again(node, self.before[node])

    def _typed(self, new: fx.Node, node: fx.Node, before: int) -> fx.Node:
        new.meta["type"] = self._type(node, before)
        rule = find_rule(node.target) if node.target is not operator.getitem else None
        new.args, new.kwargs = map_values(
            (new.args, dict(new.kwargs)),
            lambda v: self.into.size(v) if is_symbolic(v) else v,
        )
        if rule is not None and rule.shape_argument is not None:
            new.args, new.kwargs = with_argument(
                new, new.args, dict(new.kwargs), rule.shape_argument, spelled(type_of(new).shape)
            )
        return new

    def _slice(self, node: fx.Node) -> fx.Node:
        """Along the tokens a slice only says which entry is whose."""
        if Call(node)["dim"] % len(type_of(node).shape) != self.forms[node].dim:
            return self._same(node)
        return self._taken(operands(node)[0], self.before[node])

    def _pad(self, node: fx.Node) -> fx.Node:
        """Along the tokens, what is in front of token 0."""
        (source,) = operands(node)
        call, dim = Call(node), self.forms[node].dim
        left, _ = pads_of(node, dim)
        x = self._taken(source, self.before[node])
        if left > 0:
            x = filled(self.into, x, self.forms[source], self.before[node], call["value"] or 0)
        pads, place = list(call["pad"]), 2 * (len(type_of(node).shape) - 1 - dim)
        pads[place : place + 2] = [0, 0][: len(pads[place : place + 2])]
        if not any(pads):
            return x
        _, _, *others = node.args
        new = self.builder.call(
            node.target, (x, pads, *others), node.meta["type"], name=node.name,
            **self.builder.mapped(node.kwargs),
        )
        return self._typed(new, node, self.before[node])

    def _convolution(self, node: fx.Node) -> fx.Node:
        call, form = Call(node), self.forms[node]
        source, rank = operands(node)[0], len(type_of(node).shape)
        i = form.dim - rank + len(type_of(call["weight"]).shape) - 2
        if i < 0 or (len(operands(node)) and source not in self.forms):
            return self._same(node)
        before = self.before[node] + form.reach
        pads = list(call["padding"]) * (1 if len(call["padding"]) > i else i + 1)
        x = self._taken(source, before)
        if pads[i]:
            x = filled(self.into, x, self.forms[source], before, 0)
        pads[i] = 0
        args, kwargs = self.builder.mapped((node.args, node.kwargs))
        new = self.builder.call(
            node.target, (x, *args[1:]), node.meta["type"], name=node.name, **kwargs
        )
        new.args, new.kwargs = with_argument(new, new.args, dict(new.kwargs), "padding", pads)
        return self._typed(new, node, self.before[node])

    def _joined(self, node: fx.Node) -> fx.Node:
        """Entries in front of token 0 that are a tensor of their own."""
        around = joined(node, self.forms)
        if around is None:
            return self._same(node)
        source, left, _ = around
        x = self._taken(source, self.before[node])
        parts = list(Call(node)["tensors"])
        front = [self.builder.env[part] for part in parts[: parts.index(source)]]
        return in_front(
            self.into, x, self.forms[source], self.before[node], front, left
        )

    def _differences(self, node: fx.Node) -> fx.Node:
        call, form, (source, *_) = Call(node), self.forms[node], operands(node)
        before = self.before[node] + form.reach
        x = self._taken(source, before)
        if (left := front_of(node, form.dim) if call["prepend"] is not None else 0):
            front = [self.builder.env[call["prepend"]]]
            x = in_front(self.into, x, self.forms[source], before, front, left)
        return self.builder.call(
            aten.diff.default, (x, 1, call["dim"]), self._type(node), name=node.name
        )

def _refusal(node: fx.Node, why: str) -> RingCompileError:
    return error_at(
        node, f"with a cache, this {why}",
        hint="leave out --cache, or compute each result from the current and earlier tokens only",
    )


_WRITERS: dict[str, Any] = {
    "aten.constant_pad_nd.default": ShiftWriter._pad,
    "aten.pad.default": ShiftWriter._pad,
    "aten.slice.Tensor": ShiftWriter._slice,
    "aten.conv1d.default": ShiftWriter._convolution,
    "aten.conv2d.default": ShiftWriter._convolution,
    "aten.cat.default": ShiftWriter._joined,
    "aten.diff.default": ShiftWriter._differences,
}
