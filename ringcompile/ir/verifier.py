"""What must hold of a program after every pass; a failure here is our bug, not the user's."""

from __future__ import annotations

from torch import fx

from ringcompile.ir.calls import target_name
from ringcompile.ir.fused import broken_group
from ringcompile.ir.program import Program

# Their first operand is updated in place, so nothing else may read it.
CONSUMING = frozenset({"ringcompile.merge.default", "ringcompile.attend_merge.default"})
_STARTS = "ringcompile.shift_start.default"
_WAITS = "ringcompile.wait.default"


def verify_program(program: Program) -> None:
    """Check the graph's own rules.

    Every node has a type; every placeholder is a weight or an input; what an op consumes is read by
    it alone; every transfer that starts is waited for exactly once; the members of a fused group
    stand one behind the other, and each may be fused.

    Raises:
        AssertionError: with the node and the passes that ran.
    """
    ran = " -> ".join(program.passes)
    for node in program.graph.nodes:
        problem = _problem(program, node)
        assert problem is None, f"after {ran}: %{node.name} ({node.target}): {problem}"
    broken = broken_group([n for n in program.graph.nodes if n.op == "call_function"])
    assert broken is None, f"after {ran}: %{broken[0].name} ({broken[0].target}): {broken[1]}"
    program.graph.lint()


def _problem(program: Program, node: fx.Node) -> str | None:
    if node.op == "output":
        return None
    if "type" not in node.meta and node.users:
        return "has no type"
    if node.op == "placeholder":
        known = any(
            node.name in of for of in (program.weights, program.placeholders, program.state)
        )
        return None if known else "is neither a weight, an input nor state"
    if node.op != "call_function":
        return f"is a {node.op}"
    target = target_name(node.target)
    if target in CONSUMING and isinstance(node.args[0], fx.Node) and len(node.args[0].users) > 1:
        return f"uses up %{node.args[0].name}, which others read"
    return _unawaited(node) if target == _STARTS else None


def _unawaited(start: fx.Node) -> str | None:
    waits = [user for user in start.users if target_name(user.target) == _WAITS]
    return None if len(waits) == 1 else f"starts a transfer that {len(waits)} nodes wait for"
