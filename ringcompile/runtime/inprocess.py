"""Runs whole programs in this process: all ranks in lock-step, or one program for one device."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringcompile.errors import RingCompileError, one_error
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.runtime.batches import Deal, deal, part_of, uses_numbers, whole_outputs
from ringcompile.runtime.data import (
    name_inputs,
    share_keys,
    share_of,
    share_slices,
    shares_of,
)
from ringcompile.runtime.executor import Executor, Request, run_alone
from ringcompile.runtime.finite import finite_watch
from ringcompile.runtime.lockstep import LockStep
from ringcompile.runtime.outputs import EVERYTHING, Keep, Summary


@dataclass(frozen=True)
class Result:
    """What a run gives.

    Attributes:
        outputs: whole outputs, nested as the model returns them; None where none were kept.
        microbatches: for each rank, of each of its microbatches, its share of every output; a stage
            of a pipeline that is not the last has none.
        bytes_sent: by each rank.
        summaries: for each rank, of each of its microbatches, of every output, if they are kept.
        dealt: how the batch was dealt out, and the lengths of the run.
    """

    outputs: Any
    microbatches: list[tuple[tuple[torch.Tensor, ...], ...]]
    bytes_sent: list[int]
    summaries: list[tuple[tuple[Summary, ...], ...]]
    dealt: Deal

    @property
    def shares(self) -> list[tuple[torch.Tensor, ...]]:
        """Each rank's share of every output, of its first microbatch."""
        return [runs[0] for runs in self.microbatches]


def read_weights(
    program: Program, source: WeightSource | None, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The weights a program takes, by placeholder name."""
    if program.weights and source is None:
        raise RingCompileError("the program has no weights at hand")
    types = {node.name: type_of(node) for node in program.graph.nodes if node.op == "placeholder"}
    return {
        placeholder: _read(program, source, weight.name, types[placeholder]).to(device)  # type: ignore[arg-type]
        for placeholder, weight in program.weights.items()
    }


def _read(program: Program, source: WeightSource, name: str, type_: TensorType) -> torch.Tensor:
    """One rank's share of a weight; nothing else of a file is read, if the share is one piece."""
    slices = share_slices(program, type_)
    if slices and hasattr(source, "share"):
        piece: torch.Tensor = source.share(name, slices)
        return piece
    return share_of(program, source(name), type_, {})


def read_all_weights(
    programs: Sequence[Program], source: WeightSource | None, device: torch.device | str = "cpu"
) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of each rank's program; ranks that hold the same share have it once."""
    weights: dict[Any, torch.Tensor] = {}
    for program in programs:
        keys = share_keys(program)
        new = {p: program.weights[p] for p, key in keys.items() if key not in weights}
        read = read_weights(program.with_graph(program.graph, weights=new), source, device)
        weights.update({keys[p]: weight for p, weight in read.items()})
        yield {p: weights[key] for p, key in keys.items()}


@torch.no_grad()
def run_lockstep(
    programs: Sequence[Program],
    mesh: Mesh,
    source: WeightSource | None,
    inputs: Any,
    *,
    device: torch.device | str = "cpu",
    check_types: bool = False,
    compiler: str | None = None,
    keep: Keep = EVERYTHING,
    whole: bool = True,
    check_finite: bool = False,
) -> Result:
    """Run all ranks in this process.

    Args:
        programs: of all ranks, in order.
        mesh: the mesh that the programs were made for.
        source: the weights' data, the same for all ranks.
        inputs: whole inputs, by name or in order.
        device: where all ranks compute.
        check_types: hold every value against the type its node declares.
        compiler: as for `Executor`.
        keep: what is kept of the outputs.
        whole: whether outputs that are kept are put together.
        check_finite: look for the first NaN or infinity; see `finite_watch`.
    """
    first, last = programs[0], programs[-1]
    named = name_inputs(first, inputs)
    dealt = deal(first, named)
    with one_error("running the program", first.from_file):
        generators = []
        read = read_all_weights(programs, source, device)
        for program, weights in zip(programs, read, strict=True):
            executors: dict[Any, Executor] = {}
            microbatches, numbered = [], uses_numbers(program)
            for part in dealt.of(program):
                needed = part.needed(numbered)
                key = tuple(needed.items())
                if key not in executors:
                    kept = keep.program(program, needed)
                    executors[key] = Executor(
                        kept, needed, device, check_types, compiler=compiler,
                        watch=finite_watch(kept) if check_finite else None,
                    )
                share = shares_of(program, part_of(program, named, part), part.lengths)
                values = {**weights, **{p: x.to(device) for p, x in share.items()}}
                microbatches.append((executors[key], values))
            generators.append(_one_after_another(microbatches, keep))
        results, sent = LockStep(mesh).run(generators)
        shares = [tuple(outputs for outputs, _ in runs) for runs in results]
        together = whole_outputs(last, shares, dealt, keep.last) if keep.outputs and whole else None
    return Result(together, shares, sent, [tuple(s for _, s in runs) for runs in results], dealt)


def _one_after_another(
    microbatches: Sequence[tuple[Executor, dict[str, torch.Tensor]]], keep: Keep
) -> Generator[Request, Any, Any]:
    """A rank's program on each of its microbatches in order; returns what is kept of each."""
    done = []
    for executor, values in microbatches:
        outputs = yield from executor.run(values)
        done.append(keep.of(executor.program, outputs, executor.lengths))
    return tuple(done)


@torch.no_grad()
def run_single(program: Program, source: WeightSource | None, inputs: Any) -> Any:
    """Run a program that was not partitioned, on whole inputs."""
    whole = name_inputs(program, inputs)
    lengths = program.bindings(whole)
    values = read_weights(program, source)
    values.update({p: whole[name] for p, name in program.placeholders.items()})
    return program.output_structure.build(run_alone(Executor(program, lengths), values))
