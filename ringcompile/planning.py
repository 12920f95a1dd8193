"""All plans for a model on a cluster: what `ringcompile plan` prints."""

from __future__ import annotations

from typing import Any

from ringcompile import compiler
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.cost.estimate import Ask, HasRanks, Model
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.layers import cut, find_stack
from ringcompile.cost.node_times import node_times
from ringcompile.cost.planner import Planner
from ringcompile.cost.plans import Plan
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import Simulation
from ringcompile.cost.simulate import simulate as run_simulation
from ringcompile.cost.specs import Variant
from ringcompile.cost.timeline import How
from ringcompile.errors import RingCompileError
from ringcompile.garbage import few_collections
from ringcompile.ir.expr import SEQUENCE
from ringcompile.ir.program import Program
from ringcompile.options import HALVES, NONE
from ringcompile.parallel_program import ParallelProgram
from ringcompile.pass_list import prepare
from ringcompile.passes.rank.schedule import Schedule
from ringcompile.passes.sequence.split_sequence import order_of


def plan(
    model: str | Program,
    gpus: int,
    cluster: str = "h100x16",
    *,
    seq: int = 16384,
    batch: int = 1,
    dtype: str | None = None,
    fuse: bool = True,
) -> list[Plan]:
    """Rank all parallel specs for a model on a cluster: those that fit in memory, fastest first.

    Args:
        model: a captured program, or a MODEL as on the command line.
        gpus: the number of devices.
        cluster: the hardware: a name, or a file that `ringcompile calibrate` wrote.
        seq: the sequence length in tokens.
        batch: the number of sequences in a step.
        dtype: cast the model to this dtype, if it is given by name.
        fuse: as the option of `transform`.

    Raises:
        RingCompileError: an unknown cluster, a model that cannot be captured, or nothing fits.
    """
    ask = Ask(gpus, load_cluster(cluster).sized(gpus), seq, batch)
    if isinstance(model, str):
        return plans_for(model, ask, dtype, fuse=fuse)
    return plans_of(model, ask, fuse=fuse)


def simulate(
    parallel: ParallelProgram,
    cluster: str = "h100x16",
    *,
    seq: int | None = None,
    microbatches: int = 1,
) -> Simulation:
    """Estimate compute, communication and memory of each rank on a cluster.

    Args:
        parallel: what `transform` or `load` returned.
        cluster: the hardware: a name, or a file that `ringcompile calibrate` wrote.
        seq: tokens of a sequence; by default what the program is fixed to, or 16,384.
        microbatches: the number of runs of the program, one after another, as in a pipeline.

    Raises:
        RingCompileError: an unknown cluster, one that is too small, or a length that the program
            is not for.
    """
    length = parallel.program.lengths.get(SEQUENCE) or seq or 16384
    if seq is not None and seq != length:
        raise RingCompileError(f"the program is for {length} tokens, but seq is {seq}")
    hardware = load_cluster(cluster).sized(parallel.world_size)
    costs = [cost_of(program, length) for program in parallel.ranks()]
    return run_simulation(costs, hardware, How(microbatches))


def plans_for(
    model: str, ask: Ask, dtype: str | None = None, *, fuse: bool = True
) -> list[Plan]:
    """All plans for a model by name, as `ringcompile plan` prints them.

    Args:
        model: as `load_model` takes it.
        ask: devices, cluster, sequence and batch.
        dtype: to cast the model to.
        fuse: as the option of `transform`.

    Raises:
        RingCompileError: the model cannot be captured, or nothing fits.
    """
    loaded = load_model(model, dtype=dtype, weights=":" in model)
    captured = capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name)
    return plans_of(captured, ask, fuse=fuse)


@few_collections()
def plans_of(whole: Program, ask: Ask, *, fuse: bool = True) -> list[Plan]:
    """All plans for a captured model.

    Args:
        whole: captured with any batch.
        ask: devices, cluster, sequence and batch.
        fuse: as the option of `transform`.

    Raises:
        RingCompileError: the batch is fixed at several sequences, or nothing fits.
    """
    if isinstance(whole.batch, int) and whole.batch != 1:
        raise RingCompileError(
            f"the batch of '{whole.name}' is fixed at {whole.batch}, plans are made from one "
            "sequence",
            hint="; ".join(whole.notes) or None,
        )
    stack = find_stack(whole)
    prepared, checked = dict[int, Program](), dict[Any, Any]()

    def ready(stages: int) -> Program:
        """A block for each of so many stages, or the model, as far as all specs have in common."""
        stages = stages if stack is not None and stack.stands_for(stages) else 0
        if stages not in prepared:
            program = cut(whole, stack, stages) if stack is not None and stages else whole
            prepared[stages] = prepare(program)
        return prepared[stages]

    def compile_(variant: Variant, length: int) -> HasRanks:
        stages = variant.mesh.size("pp")
        starts = stack.starts(stages) if stack is not None else ()
        mesh = variant.mesh
        if variant.overlap == HALVES:
            mesh = mesh.with_axis(HALVES, variant.sequences)
        times = node_times(ask.cluster, length)
        schedule = Schedule(times) if variant.overlap != NONE else None
        return compiler.transform(
            ready(stages), mesh, check=False, checked=checked, schedule=schedule,
            **(variant.choices(length, starts) | {"fuse": fuse}),
        )

    # One that nothing reads is another name of a tied weight.
    read = [n for n in whole.graph.nodes if n.users and n.name in whole.weights]
    total = sum(whole.weights[node.name].num_bytes for node in read)
    known = Model(stack, total, whole.length_range, order_of(ready(1)))
    return Planner(known, ask, compile_).run()
