"""An upper bound for every plan: the model's work at the rates of its kernels."""

from __future__ import annotations

from ringcompile.cost.ops import kernels_of
from ringcompile.cost.values import Values
from ringcompile.ir.expr import BATCH
from ringcompile.ir.program import Program


def kernel_limit(
    program: Program, length: int, num_gpus: int, *, matmul: float, attention: float, top: int = 0
) -> float:
    """Tokens per second if matmuls and attention ran at these rates and all else were free.

    Args:
        program: of one device and one sequence, prepared (`pass_list.prepare`).
        length: tokens of the sequence.
        num_gpus: devices, each of which does an equal part.
        matmul: FLOP/s of a device in products.
        attention: FLOP/s of a device in attention, of the pairs that are visible.
        top: experts that a token goes through, in a model whose experts have buffers: what their
            capacity adds is then left out. 0 counts products as they stand in the graph.
    """
    values = Values(program, {**program.at_length(length), BATCH: 1})
    seconds = 0.0
    for node in program.graph.nodes:
        for kernel in kernels_of(values, node):
            if kernel.kind.startswith("attention"):
                seconds += kernel.flops / attention
            elif kernel.kind == "matmul":
                rows = kernel.rows
                if top and kernel.batch > 1:  # of all experts' buffers, the rows that are needed
                    rows = length * top // kernel.batch
                seconds += 2 * kernel.batch * rows * kernel.inner * kernel.columns / matmul
    return length * num_gpus / seconds
