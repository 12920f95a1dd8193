"""Every pass keeps what the program computes, and leaves its argument as it was."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.options import Options
from ringcompile.pass_list import front_passes, rank_passes
from ringcompile.passes.base import Pipeline
from ringcompile.runtime.inprocess import run_lockstep, run_single
from tests.support import difference, zoo_program

MODELS = ("llama-tiny", "gpt-tiny", "bert-tiny", "dense-4l-tiny")
MESH = Mesh.parse("ring=3")
FRONT = front_passes(MESH, Options(order="zigzag"))
# Up to here a program means the same on one device as before: layouts are only written down.
GLOBAL = [step.name for step in FRONT].index("partition")


@lru_cache
def stages(name: str) -> tuple[nn.Module, list[Program]]:
    module, _ = zoo.build(name)
    programs = [zoo_program(name, sequence=24)]
    for step in FRONT:
        programs.append(Pipeline([step]).run(programs[-1]))
    return module, programs


@pytest.mark.parametrize("stage", range(GLOBAL + 1), ids=lambda i: f"{i}-{FRONT[i].name}")
@pytest.mark.parametrize("name", MODELS)
def test_numbers_before_each_pass(name: str, stage: int) -> None:
    module, programs = stages(name)
    _, inputs = zoo.build(name, sequence=37, seed=3)
    with torch.no_grad():
        expected = module(*inputs)
    found = run_single(programs[stage], programs[0].source, inputs)
    assert difference(found, expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_numbers_after_partition_and_lowering(name: str) -> None:
    module, programs = stages(name)
    _, inputs = zoo.build(name, sequence=37, seed=3)
    ranks = [Pipeline(rank_passes(rank, MESH)).run(programs[-1]) for rank in range(3)]
    found = run_lockstep(ranks, Mesh.parse("ring=3"), programs[0].source, inputs, check_types=True)
    with torch.no_grad():
        assert difference(found.outputs, module(*inputs)) < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_passes_leave_their_argument_alone(name: str) -> None:
    _, programs = stages(name)
    for step, program in zip([*FRONT, *rank_passes(1, MESH)], [*programs, None], strict=False):
        if program is None:
            break
        before = print_program(program)
        Pipeline([step]).run(program)
        assert print_program(program) == before, step.name


def test_a_pass_that_leaves_an_invalid_program_is_named() -> None:
    _, programs = stages("llama-tiny")
    broken = programs[0].with_graph(programs[0].graph, placeholders={})
    with pytest.raises(AssertionError, match=r"after .*canonicalize: %inputs .*neither a weight"):
        Pipeline([FRONT[0]]).run(broken)


def test_pass_options_are_their_fields() -> None:
    place = next(step for step in FRONT if step.name == "place")
    assert str(place) == (
        "place{mesh=ring=3, order=zigzag, gather_unknown=False, capacity=exact, ring=rotate, "
        "tp_sequence=False}"
    )
