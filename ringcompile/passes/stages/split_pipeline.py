"""Cut a program into pipeline stages: which node runs where, and what crosses from one to the next.

Stages follow the order of the graph. What costs nothing to have anywhere (positions, rotary angles,
masks: computed by cheap ops from inputs and vectors) is computed in every stage that reads it; all
else that a later stage reads crosses each cut on its way, in transformers the hidden state alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, ClassVar

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.communication import COMMUNICATION
from ringcompile.ir.expr import BATCH, PART, SEQUENCE, Size, bind, depends_on_data, product
from ringcompile.ir.nodes import error_at, location_of, reached, results_of, type_of
from ringcompile.ir.printer import block_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass

AXIS = "pp"
# Lengths that are not known are weighed as this many tokens.
_NOMINAL_LENGTH = 4096
_MADE_ANYWHERE = frozenset({
    "ringcompile.positions.default", "ringcompile.window_positions.default",
})


@dataclass(frozen=True)
class SplitPipeline(Pass):
    """Assign every op to a pipeline stage.

    Attributes:
        mesh: the parallel plan.
        starts: the layer that each stage but the first begins with, such as "model.layers.16"; cut
            by cost where it is empty.
    """

    name: ClassVar[str] = "split-pipeline"
    mesh: Mesh
    starts: tuple[str, ...] = ()

    def run(self, program: Program) -> Program:
        """The same program with `stage` on every call.

        Raises:
            RingCompileError: more stages than layers, or layers to begin with that are none.
        """
        num_stages = self.mesh.size(AXIS)
        builder = Builder()
        for node in program.graph.nodes:
            builder.env[node] = builder.copy(node)
        program = program.with_graph(builder.graph)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        runs = _runs(calls)
        if num_stages > len(runs):
            raise RingCompileError(
                f"pp={num_stages} asks for more stages than the model has layers: {len(runs)}",
                hint=f"use pp={len(runs)} or less",
            )
        firsts = self._given(runs) if self.starts else _balanced(runs, num_stages)
        stage, notes = 0, []
        for i, (_, run) in enumerate(runs):
            stage += i in firsts
            for node in run:
                node.meta["stage"] = stage
        for node in reversed(calls):  # nothing is read before it is made
            read = [user.meta["stage"] for user in node.users if "stage" in user.meta]
            # What is stored is read from the memory of the stage that stores it.
            own = [] if read and node.target is op("store") else [node.meta["stage"]]
            node.meta["stage"] = min([*own, *read])
        _check_sizes(calls)
        bounds = [0, *sorted(firsts), len(runs)]
        for stage, (first, end) in enumerate(pairwise(bounds)):
            names = [name for name, _ in runs[first:end]]
            notes.append(f"stage {stage}: {names[0]} to {names[-1]}")
        return program.with_graph(program.graph, notes=(*program.notes, *notes))

    def _given(self, runs: Sequence[tuple[str, list[fx.Node]]]) -> set[int]:
        names = [name for name, _ in runs]
        num_cuts = self.mesh.size(AXIS) - 1
        if len(self.starts) != num_cuts:
            raise RingCompileError(
                f"pp={num_cuts + 1} needs {num_cuts} layers to begin a stage with, "
                f"{len(self.starts)} are given"
            )
        for name in self.starts:
            if name not in names[1:]:
                raise RingCompileError(
                    f"no stage can begin with '{name}'", hint=f"layers: {', '.join(names[1:])}"
                )
        found = [names.index(name) for name in self.starts]
        if found != sorted(set(found)):
            raise RingCompileError(f"the stages {', '.join(self.starts)} are not in order")
        return set(found)


def _check_sizes(calls: Sequence[fx.Node]) -> None:
    for node in calls:
        stages = {user.meta["stage"] for user in node.users if "stage" in user.meta}
        if _size_unknown(node) and stages - {node.meta["stage"]}:
            raise error_at(
                node, "a tensor whose size depends on the data would have to be sent from one "
                "pipeline stage to the next",
                hint="leave pp out, or say with --stages where stages begin",
            )


def _runs(calls: Sequence[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """The calls of each layer, in order; what stands before the first layer belongs to it.

    A model without numbered layers is taken apart at every call.
    """
    layers = [block_of(node) for node in calls]
    if not any(layers):
        single = [(location_of(node).layer or node.name, [node]) for node in calls]
        return _together(single)
    runs: list[tuple[str, list[fx.Node]]] = []
    last = max(i for i, layer in enumerate(layers) if layer)
    tied = [layer or (_next(layers, i) if i <= last else "") for i, layer in enumerate(layers)]
    for name, group in groupby(zip(tied, calls, strict=True), key=lambda pair: pair[0]):
        nodes = [node for _, node in group]
        known = next((run for run in runs if run[0] == name), None)
        if known is not None or not name:  # again, or behind the last layer
            (known or runs[-1])[1].extend(nodes)
        else:
            runs.append((name, nodes))
    return _together(runs)


def _together(runs: Sequence[tuple[str, list[fx.Node]]]) -> list[tuple[str, list[fx.Node]]]:
    """Runs, as one where a value goes from one to the other whose size only the data tells.

    The stage that receives a value has to know its size.
    """
    at = {node: i for i, (_, nodes) in enumerate(runs) for node in nodes}
    ends = [i for i, _ in enumerate(runs)]
    for node, i in at.items():
        if _size_unknown(node):
            ends[i] = max([ends[i], *(at.get(user, i) for user in node.users)])
    joined: list[tuple[str, list[fx.Node]]] = []
    reached = -1
    for i, (name, nodes) in enumerate(runs):
        if i <= reached:
            joined[-1][1].extend(nodes)
        else:
            joined.append((name, list(nodes)))
        reached = max(reached, ends[i])
    return joined


def _size_unknown(node: fx.Node) -> bool:
    types = results_of(node) if "type" in node.meta else ()
    return any(depends_on_data(size) for type_ in types for size in type_.shape)


def _next(layers: Sequence[str], index: int) -> str:
    """The layer that a call outside of layers belongs to: the next one."""
    return next(layer for layer in layers[index:] if layer)


def _balanced(runs: Sequence[tuple[str, list[fx.Node]]], num_stages: int) -> set[int]:
    """Where stages begin so that the costliest one costs least (Hansen and Lih, 1992)."""
    costs = [sum(map(work, run)) for _, run in runs]
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{0: (0.0, ())}]
    for stage in range(1, num_stages + 1):
        row: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(stage, len(runs) + 1):
            options = [
                (max(cost, sum(costs[start:end])), (*cuts, start))
                for start, (cost, cuts) in best[-1].items()
                if start < end
            ]
            row[end] = min(options)
        best.append(row)
    return set(best[-1][len(runs)][1][1:])


def work(node: fx.Node) -> float:
    """Multiplications of a call over all ranks, by its rule's factors; elements where it has none.

    Lengths that are not known count as 4,096 tokens.
    """
    if "type" not in node.meta:
        return 0.0
    rule = find_rule(_WITHOUT_RANKS.get(target_name(node.target), node.target))
    if rule is None:
        return _number(product(results_of(node)[0].shape))
    return _number(rule.multiplications(Call(node)))


# What attention on one rank's share is without ranks.
_WITHOUT_RANKS = {"ringcompile.ring_attention.default": "ringcompile.attention.default"}


def _number(size: Size) -> float:
    known: Any = bind(size, {SEQUENCE: _NOMINAL_LENGTH, BATCH: 1, PART: 1})
    if isinstance(known, int):
        return float(known)
    return float(known.xreplace(dict.fromkeys(known.free_symbols, _NOMINAL_LENGTH)))


# -- one stage ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakeStage(Pass):
    """Keep the ops of one rank's stage, and send and receive what passes between stages.

    h = add(x, mlp)              |   h = add(x, mlp)
    y = linear(h, w)             |   t = shift_start(h, axis=pp, to=1)
                                 |   ...  stage 1:  t = shift_start(None, axis=pp, source=0)
                                 |                  h = wait(t);  y = linear(h, w)
    """

    name: ClassVar[str] = "take-stage"
    mesh: Mesh

    def run(self, program: Program) -> Program:
        """The program of this rank's stage; a program without stages stays as it is."""
        assert program.coordinates is not None
        if self.mesh.size(AXIS) == 1:
            return program
        return _Stage(program, program.coordinates[AXIS], self.mesh.size(AXIS)).write()


class _Stage:
    def __init__(self, program: Program, stage: int, num_stages: int) -> None:
        self.program, self.stage, self.last = program, stage, num_stages - 1
        self.free = _free(program)
        self.builder = Builder()

    def write(self) -> Program:
        arriving = crossing(self.program, self.stage - 1, self.free) if self.stage else []
        leaving = (
            crossing(self.program, self.stage, self.free) if self.stage < self.last else []
        )
        # A stage of masks and positions alone may send nothing: later ones make these themselves.
        wanted = leaving if self.stage < self.last else list(self.program.outputs)
        stores = [
            node for node in self.program.graph.nodes
            if node.target is op("store") and node.meta["stage"] == self.stage
        ]
        needed = self._needed([*wanted, *stores], set(arriving))
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node in needed:
                self.builder.env[node] = self.builder.copy(node)
        for node in arriving:
            self.builder.at(node)
            self.builder.env[node] = self._cross(node, None, "source", self.stage - 1)
        for node in self.program.graph.nodes:
            if node in needed and node not in self.builder.env:
                self.builder.env[node] = self.builder.copy(node)
        for node in leaving:
            self.builder.at(node)
            self._cross(node, self.builder.env[node], "to", self.stage + 1)
        returned = [] if self.stage < self.last else wanted
        ends = tuple(self.builder.env[node] for node in returned)
        self.builder.output(ends)
        names = {node.name for node in needed if node.op == "placeholder"}
        return self.program.with_graph(
            self.builder.graph,
            placeholders={k: v for k, v in self.program.placeholders.items() if k in names},
            weights={k: v for k, v in self.program.weights.items() if k in names},
            state={k: v for k, v in self.program.state.items() if k in names},
        )

    def _needed(self, wanted: Sequence[fx.Node], arriving: set[fx.Node]) -> set[fx.Node]:
        """What this stage computes for these, down to what arrives."""
        needed = reached(
            (node for node in wanted if node not in arriving),
            lambda node: [n for n in node.all_input_nodes if n not in arriving],
        )
        for node in needed:
            here = node.op == "placeholder" or node in self.free
            assert here or node.meta["stage"] == self.stage, f"%{node.name} in stage {self.stage}"
        return needed

    def _cross(self, node: fx.Node, value: fx.Node | None, end: str, stage: int) -> fx.Node:
        """Send a value to the next stage (`to`), or receive it from the one before (`source`)."""
        peers: dict[str, Any] = {"to": None, "source": None, end: stage}
        type_ = type_of(node)
        arriving = type_ if value is None else TensorType.whole(type_.dtype, (0,))
        started = self.builder.call(
            op("shift_start"), (value,), arriving, why="between stages",
            axis=AXIS, sends=[], takes=[], of=node.name, **peers,
        )
        return self.builder.call(op("wait"), (started,), arriving)


def starts_of(program: Program) -> tuple[str, ...]:
    """The layers that each stage but the first begins with; see `SplitPipeline.starts`.

    Args:
        program: with `stage` on its calls.
    """
    firsts: dict[int, str] = {}
    for node in program.graph.nodes:
        if "stage" in node.meta and (layer := block_of(node)):
            firsts.setdefault(node.meta["stage"], layer)
    return tuple(firsts[stage] for stage in sorted(firsts)[1:])


def crossing(program: Program, stage: int, free: set[fx.Node] | None = None) -> list[fx.Node]:
    """The values that cross from a stage to the next, in order of the graph.

    Args:
        program: with `stage` on its calls.
        stage: the stage before the cut.
        free: what any stage computes itself, if that is known.
    """
    free = _free(program) if free is None else free
    later = {
        node
        for node in program.graph.nodes
        if node.op == "output" or node.meta.get("stage", -1) > stage
    }
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and node not in free
        and node.meta["stage"] <= stage
        and any(user in later for user in node.users)
    ]


def _free(program: Program) -> set[fx.Node]:
    """What any stage may compute itself: by cheap ops, from inputs and from weights of one dim."""
    free: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            small = node.name in program.placeholders or len(type_of(node).shape) < 2
            if small:
                free.add(node)
        elif node.op == "call_function" and target_name(node.target) not in COMMUNICATION:
            rule = find_rule(node.target)
            cheap = target_name(node.target) in _MADE_ANYWHERE or (rule is not None and rule.cheap)
            if cheap and all(n in free for n in node.all_input_nodes):
                free.add(node)
    return {node for node in free if node.op == "call_function"}

