"""A parallel plan as a file: what splits each weight and why, and where stages begin.

The plan of a compiled program can be written, edited and fed back. What a user says in it goes
before what the model says of itself (transformers' `tp_plan`), and that before what is found.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from ringcompile.axes import base_axis
from ringcompile.errors import RingCompileError
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program, Weight
from ringcompile.mesh import Mesh

# Transformers' words for a linear layer's weight [outputs, inputs], by the dim that is split.
_STYLES = {"colwise": 0, "colwise_rep": 0, "colwise_gather_output": 0, "rowwise": 1}


@dataclass(frozen=True)
class Split:
    """What becomes of a weight.

    Attributes:
        dims: the dim that each axis splits.
        why: for readers.
    """

    dims: Mapping[str, int]
    why: str = ""


@dataclass(frozen=True)
class SplitPlan:
    """A plan as its file says it.

    Attributes:
        model: the name of the model.
        mesh: the parallel spec.
        digest: of the names and shapes of the model's weights.
        weights: by name.
        stages: the layer that each pipeline stage but the first begins with.
    """

    model: str
    mesh: str
    digest: int
    weights: Mapping[str, Split] = field(default_factory=dict)
    stages: tuple[str, ...] = ()

    def to_text(self) -> str:
        """JSON, one weight a line."""
        rows = [
            f"    {json.dumps(name)}: {json.dumps({'split': split.dims, 'why': split.why})}"
            for name, split in self.weights.items()
        ]
        head = {"model": self.model, "mesh": self.mesh, "digest": self.digest,
                "stages": list(self.stages)}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        return "\n".join(["{", *lines, '  "weights": {', ",\n".join(rows), "  }", "}"]) + "\n"

    def told(self, axis: str) -> dict[str, int | None]:
        """For every weight the dim that an axis splits; None for one that it leaves whole."""
        return {name: split.dims.get(axis) for name, split in self.weights.items()}


def plan_of(program: Program, stages: tuple[str, ...] = ()) -> SplitPlan:
    """The plan that a program for all ranks was compiled with.

    Args:
        program: partitioned, with its mesh.
        stages: the layers that its stages begin with.
    """
    weights = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.weights:
            dims = {
                base_axis(axis): dim
                for dim, atoms in enumerate(layout_of(node).dims)
                for atom in atoms
                for axis in atom.axes
            }
            why = node.meta.get("why", "" if dims else "whole on every rank")
            weights[program.weights[node.name].name] = Split(dims, why)
    return SplitPlan(program.name, str(program.mesh), digest(program), weights, stages)


def digest(program: Program) -> int:
    """A number that tells models apart, by their names and what they take."""
    inputs = [(spec.name, str(spec.type.dtype), str(spec.type.shape)) for spec in program.inputs]
    return crc32(repr((program.name, inputs)).encode())


def read_plan(file: Path, program: Program, mesh: Mesh) -> SplitPlan:
    """Read a plan that need not be ours.

    Args:
        file: the file.
        program: the captured model that it is for.
        mesh: the parallel plan asked for.

    Raises:
        RingCompileError: it is no plan, or one for another model or mesh, or names what is not
            there, or splits what cannot be split.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RingCompileError(f"cannot read the plan '{file}': {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("weights", {}), dict):
        raise RingCompileError(f"'{file}' is not a plan", hint=_HOW)
    if data.get("mesh") != str(mesh):
        raise RingCompileError(
            f"the plan '{file}' is for {data.get('mesh')}, not for {mesh}", hint=_HOW
        )
    if data.get("digest") != digest(program):
        raise RingCompileError(
            f"the plan '{file}' is for another model: '{data.get('model')}'", hint=_HOW
        )
    stages = data.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(name, str) for name in stages):
        raise RingCompileError(f"'{file}': 'stages' is not a list of layers")
    weights = {weight.name: weight for weight in program.weights.values()}
    splits = {
        name: _split(file, name, entry, weights, mesh) for name, entry in data["weights"].items()
    }
    return SplitPlan(str(data.get("model")), str(mesh), data["digest"], splits, tuple(stages))


_HOW = "`ringcompile dump OUT --format plan` writes the plan of an artifact"


def _split(
    file: Path, name: str, entry: Any, weights: Mapping[str, Weight], mesh: Mesh
) -> Split:
    dims = entry.get("split") if isinstance(entry, dict) else None
    known = weights.get(name.partition("[")[0])
    if known is None:
        raise RingCompileError(f"'{file}': the model has no weight '{name}'")
    if not isinstance(dims, dict):
        raise RingCompileError(
            f"'{file}': '{name}' has no 'split'", hint='write {"split": {"tp": 0}}, or {} for whole'
        )
    for axis, dim in dims.items():
        if axis not in mesh.names:
            raise RingCompileError(f"'{file}': '{name}' is split over '{axis}', but the mesh is "
                                   f"{mesh}")
        if not isinstance(dim, int) or not 0 <= dim < len(known.shape):
            raise RingCompileError(
                f"'{file}': '{name}' {list(known.shape)} has no dim {dim} to split over '{axis}'"
            )
        if name == known.name and known.shape[dim] % mesh.size(axis):
            raise RingCompileError(
                f"'{file}': dim {dim} of '{name}' {list(known.shape)} does not divide over "
                f"{axis}={mesh.size(axis)}"
            )
    if len(set(dims.values())) < len(dims):
        raise RingCompileError(f"'{file}': '{name}' is split twice along one dim")
    return Split(dims, "plan")


def model_plan(program: Program) -> dict[str, int | None]:
    """What the model says of its own weights: the dim of each that tp splits."""
    told: dict[str, int | None] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in program.weights:
            continue
        name = program.weights[node.name].name
        layer, _, part = name.rpartition(".")
        for pattern, style in program.tp_plan.items():
            if part == "weight" and len(type_of(node).shape) == 2 and style in _STYLES and (
                fnmatch.fnmatchcase(layer, pattern)
            ):
                told[name] = _STYLES[style]
    return told
