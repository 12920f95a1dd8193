"""Which values of a program lie between all tokens and one entry a token: a shift, a convolution.

They begin where all tokens of a value are gathered, or where a value that the program has for every
position is padded, cut or convolved. They end where an entry for each token is taken again.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from ringcompile.axes import TIME
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import operands, target_name
from ringcompile.ir.expr import equal, of_tokens
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.passes.carried_dims import check_call, is_last
from ringcompile.passes.requests import REDISTRIBUTE
from ringcompile.passes.windows.shift_forms import MOVES, Form, UnknownError, form_of, joined


class ShiftRegion:
    """The values between those of all tokens and what is taken as one entry a token again.

    Args:
        program: placed along `time`.

    Attributes:
        forms: which entry belongs to which token, of every value of which that is known.
        between: those that the program has on a window only; others of `forms` it has for every
            position.
        unknown: ops that cannot be written so, and why.
        before: how many tokens before the new ones are wanted of a value.
        everywhere: ids and masks that are shifted, for every position: that costs little.
    """

    def __init__(self, program: Program) -> None:
        assert program.sequence is not None
        self.length = program.sequence.length
        self.forms: dict[fx.Node, Form] = {}
        self.between: set[fx.Node] = set()
        self.everywhere: set[fx.Node] = set()
        self.unknown: dict[fx.Node, str] = {}
        self.before: dict[fx.Node, int] = {}
        for node in program.graph.nodes:
            self._read(node)
        for node in reversed(program.graph.nodes):
            if node in self.between:
                self.before[node] = max((self._wants(u, node) for u in node.users), default=0)

    def handles(self, node: fx.Node) -> bool:
        """Whether a node is one of those written here."""
        return node in self.between

    def _read(self, node: fx.Node) -> None:
        if node.op == "output" or _splits_time(node):
            return
        if gathers_time(node):
            self._gathered(node)
            return
        given = node.all_input_nodes
        between = any(n in self.between for n in given)
        try:
            if any(n in self.forms for n in given):
                form: Form | None = self._form(node)
            else:
                form = self._begun(node)
        except UnknownError as error:
            if between:
                self.unknown[node] = error.reason
            return
        refused = node.op == "call_function" and _is_refused(node)
        if form is not None:
            self.forms[node] = form
            if between or (refused and type_of(node).dtype.is_floating_point):
                self.between.add(node)
            elif refused:
                self.everywhere.add(node)

    def _gathered(self, node: fx.Node) -> None:
        """All tokens of a value that the program has for the new ones."""
        (source,) = operands(node)
        if all(is_last(user, self.length) for user in node.users):
            return
        (dim,) = (i for i, d in enumerate(type_of(source).layout.dims)
                  if any(TIME in atom.axes for atom in d))
        if equal(type_of(node).shape[dim], self.length):
            self.forms[node] = Form(dim)
            self.between.add(node)

    def _begun(self, node: fx.Node) -> Form | None:
        """Of a value that is made of no other with an entry for each token."""
        type_ = node.meta.get("type")
        if not isinstance(type_, TensorType) or TIME in type_.layout.axes:
            return None
        long = [dim for dim, size in enumerate(type_.shape) if of_tokens(size)]
        one = len(long) == 1 and equal(type_.shape[long[0]], self.length)
        if not one or (node.op == "call_function" and _is_refused(node)):
            return None
        return Form(long[0])

    def _form(self, node: fx.Node) -> Form:
        if node.target is operator.getitem:
            return replace(self.forms[node.args[0]], reach=0)  # type: ignore[index]
        if node.target is REDISTRIBUTE:  # not along the tokens, which is asked before
            return replace(self.forms[operands(node)[0]], reach=0)
        if is_last(node, self.length):
            raise UnknownError
        return form_of(node, self.forms, self.length)

    def _wants(self, user: fx.Node, node: fx.Node) -> int:
        """How many tokens before the new ones a user wants of a value."""
        if user not in self.between:
            return max(self.forms[node].offset, 0)  # as one entry a token
        return self.before[user] + self.forms[user].reach + self.late(user, node)

    def late(self, user: fx.Node, node: fx.Node) -> int:
        """By how many tokens an op's result is ahead of this operand, entry by entry."""
        own = target_name(user.target) in MOVES or joined_along(user, self.forms) is not None
        return 0 if own else self.forms[node].offset - self.forms[user].offset


def joined_along(node: fx.Node, forms: dict[fx.Node, Form]) -> fx.Node | None:
    """What a `cat` along the tokens puts entries around; None of any other op."""
    if target_name(node.target) != "aten.cat.default" or node not in forms:
        return None
    around = joined(node, forms)
    return None if around is None else around[0]


def _is_refused(node: fx.Node) -> bool:
    """Whether an op may not be done for every position that there may be."""
    if node.target is REDISTRIBUTE:
        return False
    try:
        check_call(node)
    except RingCompileError:
        return True
    return False


def gathers_time(node: fx.Node) -> bool:
    """Whether a node asks for all tokens of a value that is there for the new ones."""
    return node.target is REDISTRIBUTE and TIME in layout_of(operands(node)[0]).axes and (
        TIME not in layout_of(node).axes
    )


def _splits_time(node: fx.Node) -> bool:
    return node.target is REDISTRIBUTE and TIME in layout_of(node).axes
