"""All that a hand-written attention adds to its scores and fills into them, as one mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.attention.score_steps import Fill, NotUnderstoodError, Scores, short
from ringcompile.passes.base import Builder
from ringcompile.passes.masks.analysis import Analysis
from ringcompile.passes.masks.operands import as_mask, broadcast, joined
from ringcompile.passes.masks.values import sees_itself
from ringcompile.passes.views import cast

aten = torch.ops.aten


@dataclass
class MaskWriter:
    """Writes the mask of one attention.

    Attributes:
        builder: of the new graph.
        analysis: what is known of the masks that are filled in.
        heads: sizes of the batch and of the heads of its queries.
    """

    builder: Builder
    analysis: Analysis
    heads: tuple[Size, Size]

    def visible(self, fill: Fill) -> fx.Node:
        """Bool in 4 dims: where the score stays."""
        flag = cast(self.builder, self.builder.env[fill.node], torch.bool)
        if fill.where:
            flag = self._negated(flag)
        return as_mask(self.builder, flag, fill.lead, self.heads)

    def bias(self, scores: Scores) -> fx.Node | None:
        """All that is added to scores, in 4 dims."""
        found = []
        for bias, factor in scores.biases:
            x = self.builder.env[bias.node]
            if not type_of(x).dtype.is_floating_point:
                raise NotUnderstoodError(f"{type_of(x)} is added to its scores")
            x = as_mask(self.builder, x, bias.lead, self.heads)
            if factor != 1:
                x = self.builder.call(aten.mul.Tensor, (x, factor), type_of(x))
            found.append(x)
        return joined(found, self.builder)

    def mask(
        self,
        scores: Scores,
        q: fx.Node,
        k: fx.Node,
        flags: list[fx.Node],
        bias: fx.Node | None,
        zeroed: Sequence[fx.Node],
    ) -> tuple[fx.Node, fx.Node | None]:
        """One mask of all that is added and filled in; queries are 0 where all keys are even."""
        finite = {fill.value for fill in scores.fills if fill.value != -inf}
        even = [fill.node for fill in scores.fills if fill.value != -inf]
        square = equal(type_of(q).shape[2], type_of(k).shape[2])
        sure = square and all(sees_itself(self.analysis.condition(flag)) for flag in flags)
        # All of such a row's weight is the sink's, or set to 0.
        gone = scores.sink is not None or all(node in zeroed for node in even)
        if not finite or sure or gone:
            return q, joined([*flags, *([bias] if bias is not None else [])], self.builder)
        if len(finite) > 1 or zeroed:
            raise NotUnderstoodError("its masked scores are replaced by several different numbers")
        if scores.order != sorted(scores.order):
            raise NotUnderstoodError("its scores are masked before a bias is added")
        return self._even_rows(scores, q, flags, bias)

    def _negated(self, flag: fx.Node) -> fx.Node:
        """The opposite; that of `or` as an `and`, of which the parts of a mask can be read."""
        if short(flag) in ("logical_not", "bitwise_not"):
            return flag.args[0]  # type: ignore[return-value]
        type_ = type_of(flag)
        source = flag.all_input_nodes[0] if flag.all_input_nodes else flag
        if flag.target is aten.eq.Scalar and Call(flag)["other"] == 0 and (
            type_of(source).dtype == torch.bool
        ):
            return source
        if short(flag) in ("__or__", "bitwise_or", "logical_or"):
            a, b = (self._negated(x) for x in Call(flag).operands)
            return self.builder.call(aten.logical_and.default, (a, b), type_)
        return self.builder.call(aten.logical_not.default, (flag,), type_)

    def _even_rows(
        self, scores: Scores, q: fx.Node, flags: list[fx.Node], bias: fx.Node | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Where a row sees no key, the scores that are one finite number share its weight evenly.

        A query of 0 that sees those keys shares it so, too.
        """
        visible = joined(flags, self.builder)
        assert visible is not None
        rows = TensorType.whole(torch.bool, (*type_of(visible).shape[:3], 1))
        sees = self.builder.call(aten.any.dim, (visible, -1, True), rows)
        blind = self.builder.call(aten.logical_not.default, (sees,), rows)
        q = self.builder.call(aten.masked_fill.Scalar, (q, blind, 0.0), type_of(q))
        evened = blind
        if any(fill.value == -inf for fill in scores.fills):
            evened = self._both("logical_and", blind, self._finite(scores.fills, flags))
        visible = self._both("logical_or", visible, evened)
        if bias is None:
            return q, visible
        type_ = broadcast([blind, bias], type_of(bias).dtype)
        bias = self.builder.call(aten.where.ScalarSelf, (blind, 0.0, bias), type_)
        return q, joined([visible, bias], self.builder)

    def _finite(self, fills: Sequence[Fill], flags: Sequence[fx.Node]) -> fx.Node:
        """Where a finite number has the last word."""
        found: fx.Node | None = None
        for fill, flag in zip(fills, flags, strict=True):
            if fill.value == -inf:
                found = found and self._both("logical_and", found, flag)
                continue
            hidden = self.builder.call(aten.logical_not.default, (flag,), type_of(flag))
            found = hidden if found is None else self._both("logical_or", found, hidden)
        assert found is not None
        return found

    def _both(self, name: str, a: fx.Node, b: fx.Node) -> fx.Node:
        target = getattr(aten, name).default
        return self.builder.call(target, (a, b), broadcast([a, b], torch.bool))
