"""Tensor parallelism of the vocabulary: its table, and the head, by the rows of their weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.rules import find_rule
from ringcompile.passes.canonicalize.limit_ids import ids_of
from ringcompile.passes.tensor.requests import TP, TensorRequests

aten = torch.ops.aten


class VocabularySplits(TensorRequests):
    """Splits look-ups of tokens and the head; logits stay split."""

    def vocabulary(self, node: fx.Node, call: Call, operands: list[fx.Node]) -> fx.Node | None:
        """A table of tokens, and the head, by the rows of their weights; logits stay split."""
        if node.target is aten.embedding.default:
            alone = self.run_of_heads == self.size  # every rank holds all rows, and reads few
            place, other, splits = 0, 1, not alone and self._is_of_ids(node, call.operands[1])
        elif node.target is aten.linear.default and len(operands) == 2:
            place, other, splits = 1, 0, self._is_head(node)
        else:
            return None
        if not splits or not self.is_weight(operands[place]):
            return None
        table = self._rows_of_weight(operands[place])
        if table is None:
            return None
        x = self.request(self.summed(operands[other]), layout_of(call.operands[other]))
        if place == 0:
            return self.emit(node, [table, x], replace(layout_of(node), partial=(TP,)))
        return self.emit(node, [x, table], layout_of(node).with_dim(-1, layout_of(table).dims[0]))

    def _rows_of_weight(self, weight: fx.Node) -> fx.Node | None:
        size = type_of(weight).shape[0]
        split = (Atom(size, (TP,)),)
        if not self.may_split(weight, layout_of(weight).with_dim(0, split)):
            return None
        self.why = "rows of the vocabulary"
        if not self.divides(split):
            self.notes.append(
                f"{self._weight_name(weight)}: {size} rows do not divide over {self.ranks_text}: "
                "replicated on each of its ranks"
            )
            return None
        return self.obtain(weight, layout_of(weight).with_dim(0, split))

    def _weight_name(self, node: fx.Node) -> str:
        while node.op != "placeholder":
            (node,) = node.all_input_nodes
        return self.weights[node.name].name

    def _is_of_ids(self, node: fx.Node, ids: fx.Node) -> bool:
        """Whether a table may be split by its rows: its ids are checked where inputs are shared.

        Computed ids are not. Of a split table, one that no rank has would be read as zeros; of a
        whole one, the look-up itself fails.
        """
        if ids_of(ids, self.program) is not None:
            return True
        if self._reads_input(ids):
            self.note(node, "ids that the model computes cannot be checked before it runs: their "
                            "table is replicated")
        return False

    def _reads_input(self, node: fx.Node) -> bool:
        """Whether a value is computed from what the caller passes: tokens, not positions."""
        if node.op == "placeholder":
            return node.name in self.program.placeholders
        return any(map(self._reads_input, node.all_input_nodes))

    def _is_head(self, node: fx.Node) -> bool:
        """Whether a split of the last dim would stay up to the outputs, at no cost."""
        split = layout_of(node).with_dim(-1, (Atom(type_of(node).shape[-1], (TP,)),))
        return all(self._leads_out(user, node, split) for user in node.users)

    def _leads_out(self, user: fx.Node, operand: fx.Node, layout: Layout) -> bool:
        if user.op == "output":
            return True
        rule = find_rule(user.target)
        if rule is None or not rule.cheap or len(user.all_input_nodes) > 1:
            return False
        placement = self.forward(user, rule, [layout])
        kept = placement is not None and TP in placement.output.axes
        return kept and all(
            self._leads_out(after, user, placement.output)  # type: ignore[union-attr]
            for after in user.users
        )
