"""Which entry belongs to which token where ops pad, cut, shift and convolve a whole sequence.

    x                  x0 x1 x2 x3          token p is entry p
    pad (2, 0)   0  0  x0 x1 x2 x3          token p is entry p + 2: offset 2
    conv, 3 wide       y0 y1 y2 y3          y of token p is made of tokens p-2 .. p: offset 0

A `Form` says this of a value. Entries in front of token 0 are what a pad or a `cat` put there;
those behind the last token are never used where the value is taken as one with an entry for each
token again. A value of which that can be said depends on each token's last few predecessors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ringcompile.ir.calls import Call, operands, target_name
from ringcompile.ir.expr import Size, equal, of_tokens, product, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.rules.base import ViewRule
from ringcompile.ops.running import ALONG


@dataclass(frozen=True)
class Form:
    """How entries of a value stand to tokens.

    Attributes:
        dim: the dim with the entries.
        offset: token p is entry p + offset.
        extra: how many more entries than tokens there are.
        known: entries from `tokens + known` on do not belong to their token: padding on the right.
        reach: how many tokens before its own the op looks at, in its first operand.
    """

    dim: int
    offset: int = 0
    extra: int = 0
    known: int = 0
    reach: int = 0

    def padded(self, left: int, right: int) -> Form:
        """With so many entries more on both sides; fewer, where a number is negative."""
        extra = self.extra + left + right
        return replace(
            self, offset=self.offset + left, extra=extra, known=min(self.known + left, extra),
        )

    def narrowed(self, reach: int) -> Form:
        """Each entry made of itself and so many behind it: it belongs to the last one's token."""
        return replace(
            self, offset=self.offset - reach, extra=self.extra - reach, known=self.known - reach,
            reach=reach,
        )

    @property
    def one_a_token(self) -> bool:
        """Whether, moved by the offset, there is an entry for each token, from earlier ones."""
        return self.extra == 0 and self.offset >= 0 and self.known >= 0

    @property
    def around(self) -> tuple[int, int]:
        """How many tokens in front of its first entry's and behind its last one's have none."""
        return -self.offset, self.offset - self.extra

    @property
    def is_part(self) -> bool:
        """Whether it has an entry for a run of the tokens, and for no others."""
        return self.extra < 0 and min(self.around) >= 0


_NOT_CAUSAL = "cannot be shown to use only the current and earlier tokens for each result"


class UnknownError(Exception):
    """Nothing is known of an op that says which entry belongs to which token.

    Args:
        reason: what a user is told of it.
    """

    def __init__(self, reason: str = _NOT_CAUSAL) -> None:
        super().__init__(reason)
        self.reason = reason


# Ops whose rules let the dim through, and which go along it.
_ALONG = frozenset({*ALONG, "ringcompile.attention.default"})
NEEDS_ALL = (
    "needs all tokens of the sequence at once, and later tokens may change the results for "
    "earlier ones"
)


def form_of(node: fx.Node, forms: Mapping[fx.Node, Form], length: Size) -> Form:
    """The form of a result.

    Args:
        node: a call that reads a value of `forms`.
        forms: of the values before it.
        length: of the sequence.

    Raises:
        UnknownError: nothing is known of the op, or of these arguments.
    """
    name = target_name(node.target)
    if name == "aten.cat.default" and (around := joined(node, forms)) is not None:
        x, left, right = around
        return replace(forms[x], reach=0).padded(left, right)
    source = operands(node)[0]
    if name in _FORMS and source in forms:
        return _FORMS[name](node, replace(forms[source], reach=0), length)
    return _passed(node, forms)


def _passed(node: fx.Node, forms: Mapping[fx.Node, Form]) -> Form:
    """Of an op whose rule lets the dim through: the operands' entries, one by one."""
    rule, given = find_rule(node.target), operands(node)
    found = [forms[n] for n in given if n in forms]
    if isinstance(rule, ViewRule):
        return replace(found[0], dim=_viewed(node, found[0].dim), reach=0)
    if target_name(node.target) in _ALONG:
        raise UnknownError(NEEDS_ALL)
    if not isinstance(rule, FactorRule) or len({form.extra for form in found}) > 1:
        raise UnknownError
    names, dims = rule.factors(Call(node)), set()
    along = {names.operands[i][forms[n].dim] for i, n in enumerate(given) if n in forms} - {None}
    for place, operand in enumerate(given):
        if operand in forms:
            factor = names.operands[place][forms[operand].dim]
            if factor is None or factor not in names.output:
                raise UnknownError(NEEDS_ALL)
            dims.add(names.output.index(factor))
        elif any(map(of_tokens, type_of(operand).shape)) or along & set(names.operands[place]):
            raise UnknownError  # which entry is whose is not known
    if len(dims) > 1:
        raise UnknownError
    return Form(
        dims.pop(), min(f.offset for f in found), found[0].extra, min(f.known for f in found)
    )


def beside(node: fx.Node, forms: Mapping[fx.Node, Form]) -> dict[fx.Node, Form]:
    """The form of operands that an op pairs entry by entry with a value that has too few of them.

    The image's tokens of a joint attention over text and image are fewer than the sequence; what
    is added to them or multiplied with them (the residual, rotary angles) belongs to the same ones.
    Empty where all operands are in `forms`, or where they do not agree on whose the entries are.
    """
    rule, given = find_rule(node.target), operands(node)
    if not isinstance(rule, FactorRule) or target_name(node.target) in _ALONG:
        return {}
    names = rule.factors(Call(node)).operands
    held = [(forms[n], dims[forms[n].dim]) for n, dims in zip(given, names, strict=True)
            if n in forms]
    if len({(replace(form, dim=0, reach=0), factor) for form, factor in held}) != 1:
        return {}
    form, factor = held[0]
    if factor is None or not form.is_part:
        return {}
    return {
        n: replace(form, dim=dims.index(factor), reach=0)
        for n, dims in zip(given, names, strict=True) if n not in forms and factor in dims
    }


def _viewed(node: fx.Node, dim: int) -> int:
    """The dim that a view leaves as it is."""
    source, target = type_of(operands(node)[0]).shape, type_of(node).shape
    before = product(source[:dim])
    for i, size in enumerate(target):
        if equal(size, source[dim]) and equal(product(target[:i]), before):
            return i
    raise UnknownError


def _padded(node: fx.Node, form: Form, length: Size) -> Form:
    pads = pads_of(node, form.dim)
    if pads != (0, 0) and Call(node).get("mode", "constant") != "constant":
        raise UnknownError(NEEDS_ALL)  # mirrored, say
    return form.padded(*pads)


def pads_of(node: fx.Node, dim: int) -> tuple[int, int]:
    """How many entries a pad adds on the left and on the right of a dim."""
    pads, place = list(Call(node)["pad"]), 2 * (len(type_of(node).shape) - 1 - dim)
    left, right = pads[place : place + 2] if place < len(pads) else (0, 0)
    return _number(left), _number(right)


def _sliced(node: fx.Node, form: Form, length: Size) -> Form:
    call = Call(node)
    if call["dim"] % len(type_of(node).shape) != form.dim:
        return form
    start = _number(call["start"] or 0)
    if call["step"] != 1 or start < 0:
        raise UnknownError
    extra = _number(simplify(type_of(node).shape[form.dim] - length))
    return form.padded(-start, extra - (form.extra - start))


def joined(node: fx.Node, forms: Mapping[fx.Node, Form]) -> tuple[fx.Node, int, int] | None:
    """What a `cat` along the tokens puts entries around, and how many in front and behind.

    None where it is along another dim.

    Raises:
        UnknownError: several values of tokens follow one another.
    """
    call = Call(node)
    parts: list[fx.Node] = list(call["tensors"])
    held = [part for part in parts if part in forms]
    if call["dim"] % len(type_of(node).shape) != forms[held[0]].dim:
        return None
    if len(held) > 1:
        raise UnknownError
    dim, at = forms[held[0]].dim, parts.index(held[0])
    counts = [_number(type_of(part).shape[dim]) for part in (*parts[:at], *parts[at + 1 :])]
    return held[0], sum(counts[:at]), sum(counts[at:])


def _convolved(node: fx.Node, form: Form, length: Size) -> Form:
    """Padded on both sides, then each entry made of as many as the kernel is wide."""
    call, rank = Call(node), len(type_of(node).shape)
    weight = type_of(call["weight"]).shape
    i = form.dim - rank + len(weight) - 2  # among the spatial dims
    if i == -1:
        raise UnknownError(NEEDS_ALL)  # tokens as channels
    if i < 0:
        return form  # as samples
    if call["stride"][i % len(call["stride"])] != 1 or isinstance(call["padding"], str):
        raise UnknownError
    pad = call["padding"][i % len(call["padding"])]
    reach = (_number(weight[2 + i]) - 1) * call["dilation"][i % len(call["dilation"])]
    return form.padded(pad, pad).narrowed(reach)


def _unfolded(node: fx.Node, form: Form, length: Size) -> Form:
    call = Call(node)
    if call["dimension"] % (len(type_of(node).shape) - 1) != form.dim:
        return form
    if call["step"] != 1:
        raise UnknownError
    return form.narrowed(call["size"] - 1)


def _differences(node: fx.Node, form: Form, length: Size) -> Form:
    call = Call(node)
    if call["dim"] % len(type_of(node).shape) != form.dim:
        return form
    if call["n"] != 1 or call["append"] is not None:
        raise UnknownError
    return form.padded(front_of(node, form.dim), 0).narrowed(1)


def front_of(node: fx.Node, dim: int) -> int:
    """How many entries `diff` puts in front of its operand's."""
    front = Call(node)["prepend"]
    return 0 if front is None else _number(type_of(front).shape[dim])


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise UnknownError
    return value


_FORMS: dict[str, Callable[[fx.Node, Form, Size], Form]] = {
    "aten.constant_pad_nd.default": _padded,
    "aten.pad.default": _padded,
    "aten.slice.Tensor": _sliced,
    "aten.conv1d.default": _convolved,
    "aten.conv2d.default": _convolved,
    "aten.unfold.default": _unfolded,
    "aten.diff.default": _differences,
}
# Ops that say which entry is whose: their window is their operand's, token by token.
MOVES = frozenset(_FORMS)
