"""Which thin ops of a run of calls one kernel can compute.

Two thin ops share a group if one reads the other, unless

- an op that runs by itself, such as a matmul, lies on a way from one to the other. So every node
  has a *depth*, the number of such ops in front of it on the longest way, and a group has one.
  What is read by a group alone has the group's depth;
- groups would then wait for each other;
- a result that others read would have to wait for what it does not need. The rotated keys of a
  layer, which are sent to another rank, do not wait for the queries because both read the same
  angles.

Views at the beginning and at the end of a group that only look at its operands and results make no
kernel and stay outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from ringcompile.ir.fused import is_thin, needs_whole, only_looks, starts_group, working


def thin_groups(calls: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The groups among these calls, each in their order.

    Args:
        calls: neighbours in a graph that may be put in another order.
    """
    thin = [node for node in calls if is_thin(node) or starts_group(node)]
    if len(thin) < 2:
        return []
    groups = _Groups(calls, thin)
    joined = True
    while joined:  # what was in the way of two groups may since have joined one of them
        joined = False
        for one, other in groups.pairs():
            joined |= groups.join(one, other)
    found = {id(group): group for group in groups.of.values()}
    return [group for group in found.values() if len(working(group)) > 1]


class _Groups:
    """Groups that are joined as far as they may be.

    Attributes:
        of: the group of each thin node that may be in one.
    """

    def __init__(self, calls: Sequence[fx.Node], thin: Sequence[fx.Node]) -> None:
        self.places = {node: i for i, node in enumerate(calls)}
        self.depth = self._depths(calls, set(thin))
        # What each call needs, directly or not, as bits by their places.
        self.needs: dict[fx.Node, int] = {}
        for node in calls:
            self.needs[node] = 0
            for operand in self._read(node):
                self.needs[node] |= self.needs[operand] | 1 << self.places[operand]
        self.of = {node: [node] for node in self._without_outer_views(thin)}

    def pairs(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """All thin nodes that read another one at the same depth, with that."""
        for node in self.of:
            for operand in self._read(node):
                if operand in self.of and self.depth[operand] == self.depth[node]:
                    yield operand, node

    def join(self, one: fx.Node, other: fx.Node) -> bool:
        """Make one group of the groups of a node and its reader, if that may be."""
        first, second = self.of[one], self.of[other]
        if first is second:
            return False
        both = sorted([*first, *second], key=self.places.__getitem__)
        if self._holds_up(both) or self._comes_between(first, set(both)):
            return False
        self.of.update(dict.fromkeys(both, both))
        return True

    def _read(self, node: fx.Node) -> list[fx.Node]:
        return [operand for operand in node.all_input_nodes if operand in self.places]

    def _depths(self, calls: Sequence[fx.Node], thin: set[fx.Node]) -> dict[fx.Node, int]:
        depth: dict[fx.Node, int] = {}
        for node in calls:
            depth[node] = max(
                (depth[x] + (x not in thin or (node in thin and needs_whole(node, x)))
                 for x in self._read(node)), default=0,
            )
        for node in reversed(calls):
            readers = {depth.get(user, -1) for user in node.users}
            if node in thin and len(readers) == 1 and self._may_wait(node, thin):
                depth[node] = max(depth[node], *readers)
        return depth

    @staticmethod
    def _may_wait(node: fx.Node, thin: set[fx.Node]) -> bool:
        """Whether a node may be computed along with its readers, however late these are."""
        return not starts_group(node) and all(
            user in thin and not needs_whole(user, node) for user in node.users
        )

    def _without_outer_views(self, thin: Sequence[fx.Node]) -> list[fx.Node]:
        """The thin nodes but for views that only look at what a group reads or gives.

        A view of an operand stays in the group if nothing else reads it.
        """
        kept = set(thin)
        for node in reversed(thin):
            if only_looks(node) and not any(self._is_near(node, x, kept) for x in node.users):
                kept.discard(node)
        for node in thin:
            if node in kept and only_looks(node):
                inner = any(self._is_near(node, x, kept) for x in node.all_input_nodes)
                if not inner and not all(self._is_near(node, x, kept) for x in node.users):
                    kept.discard(node)
        return [node for node in thin if node in kept]

    def _is_near(self, node: fx.Node, other: fx.Node, kept: set[fx.Node]) -> bool:
        return other in kept and self.depth[other] == self.depth[node]

    def _holds_up(self, group: Sequence[fx.Node]) -> bool:
        """Whether a result that others read would wait for an operand that it does not need."""
        inside, operands = set(group), 0
        for node in group:
            for operand in self._read(node):
                operands |= 0 if operand in inside else 1 << self.places[operand]
        return any(
            operands & ~self.needs[node]
            for node in group if any(user not in inside for user in node.users)
        )

    def _comes_between(self, first: Sequence[fx.Node], both: set[fx.Node]) -> bool:
        """Whether a way leads from one group through others to the other one or back."""
        depth = self.depth[first[0]]
        seen = set[fx.Node]()
        work = [user for node in both for user in node.users if user not in both]
        while work:
            node = work.pop()
            if node in both:
                return True
            if node not in seen and self.depth.get(node) == depth:
                members = self.of.get(node, [node])
                seen.update(members)
                work += [user for member in members for user in member.users]
        return False
