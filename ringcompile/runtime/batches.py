"""Batches larger than the captured one: dealt to replicas (`dp`), to a pipeline in microbatches.

A program is compiled for the batch that the model was captured with. A mesh with `dp` or `pp` takes
any multiple of it: every replica gets as many rows, and runs them in microbatches of the captured
size, in order, so that the stages of a pipeline work on different ones at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ringcompile.errors import RingCompileError
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.runtime.data import assemble_outputs, by_replica

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Deal:
    """Whole inputs, dealt.

    Attributes:
        hands: for each replica its microbatches, in order.
    """

    hands: tuple[tuple[Inputs, ...], ...]

    def of(self, program: Program) -> tuple[Inputs, ...]:
        """The microbatches of the replica that a rank's program belongs to."""
        return self.hands[(program.coordinates or {}).get("dp", 0)]


def deal(program: Program, inputs: Mapping[str, torch.Tensor]) -> Deal:
    """Deal whole inputs out.

    Args:
        program: any rank's program.
        inputs: by name; those with a batch dim of a multiple of the captured size are dealt, others
            are the same for all.

    Raises:
        RingCompileError: the batch is no multiple, or not one for all inputs, or does not divide
            over `dp`.
    """
    mesh = program.mesh
    replicas = mesh.size("dp") if mesh is not None else 1
    if mesh is None or replicas * mesh.size("pp") == 1:
        return Deal(((dict(inputs),),))
    times = {name: _times(program, name, tensor) for name, tensor in inputs.items()}
    counts = {count for count in times.values() if count > 1}
    if len(counts) > 1:
        raise RingCompileError(
            f"inputs differ in their batch: {', '.join(f'{n}: {t}' for n, t in times.items())} "
            "times the captured one"
        )
    count = counts.pop() if counts else 1
    _check_dealt(program, inputs, count)
    if count % replicas:
        raise RingCompileError(
            f"a batch of {count} times the captured one does not divide over dp={replicas}",
            hint=f"pass a multiple of {replicas} times the captured batch",
        )
    parts = [
        {name: tensor.chunk(count)[i] if times[name] > 1 else tensor
         for name, tensor in inputs.items()}
        for i in range(count)
    ]
    each = count // replicas
    return Deal(tuple(tuple(parts[i * each : (i + 1) * each]) for i in range(replicas)))


def _check_dealt(program: Program, inputs: Mapping[str, torch.Tensor], count: int) -> None:
    """Raise RingCompileError where rows would be paired with those of another sequence."""
    if count > 1 and program.fixed_batch:
        raise RingCompileError(
            f"a batch of {count} times the captured one cannot be dealt out: the model's sequences "
            "change each other's results",
            hint=f"pass {program.batch} sequences, as captured",
        )
    for spec in program.inputs:
        shape = spec.type.shape
        rows = inputs[spec.name].shape[:1]
        if len(shape) > 1 and shape[0] == program.batch > 1 and rows != (count * program.batch,):
            raise RingCompileError(
                f"input '{spec.name}' has shape {list(inputs[spec.name].shape)}, others have "
                f"{count * program.batch} sequences",
                hint="pass the same sequences in all inputs",
            )


def _times(program: Program, name: str, tensor: torch.Tensor) -> int:
    """How many captured batches an input holds; 1 where its first dim is as captured, or no batch.

    What does not fit is left to `Program.bindings` to refuse.
    """
    shape = next(spec.type.shape for spec in program.inputs if spec.name == name)
    if not shape or tensor.dim() != len(shape) or not isinstance(shape[0], int) or not shape[0]:
        return 1
    times, rest = divmod(tensor.shape[0], shape[0])
    return 1 if rest or len(shape) < 2 else max(times, 1)


def whole_outputs(
    program: Program,
    everyones: Sequence[Sequence[Sequence[torch.Tensor]]],
    lengths: dict[str, int],
    last: int | None = None,
) -> Any:
    """The outputs for the whole batch, nested as the model returns them.

    Args:
        program: that of the last rank, which is one of the last stage.
        everyones: for each rank, of each of its microbatches, its share of every output.
        lengths: of the run.
        last: the number of last positions that were kept; None for all.

    Raises:
        RingCompileError: there are several microbatches, and an output has no batch dim.
    """
    mesh = program.mesh
    assert mesh is not None
    made = [
        assemble_outputs(program, [runs[i] for runs in replica], lengths, last)
        for replica in by_replica(mesh, everyones)
        for i in range(len(replica[0]))
    ]
    return made[0] if len(made) == 1 else _joined(program, made)


def _joined(program: Program, outputs: Sequence[Any]) -> Any:
    """Outputs of all microbatches along their batch dim."""
    batches = {spec.type.shape[0] for spec in program.inputs if len(spec.type.shape) > 1}
    for node in program.outputs:
        shape = type_of(node).shape
        if not shape or shape[0] not in batches:
            raise RingCompileError(
                f"the output {type_of(node)} has no batch dim: it cannot be put together from "
                "microbatches",
                hint="run one batch of the captured size, without dp",
            )

    def joined(*parts: Any) -> Any:  # what is no tensor is a constant, or None
        return torch.cat(parts) if torch.is_tensor(parts[0]) else parts[0]

    return pytree.tree_map(joined, outputs[0], *outputs[1:])
