"""Fused groups as compiled functions: how many are made, what they compute, and what if none is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import ringcompile as rc
from benchmarks import fused
from ringcompile.ir.fused import groups_of
from ringcompile.ir.program import Program
from ringcompile.runtime import groups
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.groups import Bodies, bodies_of
from ringcompile.runtime.runner import OpenWeights, Runner, Settings
from tests.runtime.one_rank import one_rank, run_alone
from tests.support import difference

NO_COMPILER = "no C++ compiler is there"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Bodies that no earlier test compiled."""
    bodies_of.cache_clear()
    yield
    bodies_of.cache_clear()


class Chains(nn.Module):
    """Two groups, which read rows and write rows; the second has two results."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.down(F.silu(self.up(x)) * 3 + 1)
        total = (x + h).unflatten(-1, (2, 4)).transpose(-1, -2)
        return total * 2, torch.softmax(h, -1) * 2


def program_of(module: nn.Module, x: torch.Tensor) -> rc.ParallelProgram:
    return rc.transform(rc.capture(module, (x,)), "dp=1", length=x.shape[1])


def test_bodies_that_are_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = one_rank("dense-4l-tiny")
    found = groups_of(made.program.graph.nodes)
    compiled: list[str] = []

    def counted(self: Bodies, module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        compiled.append(module.code)
        return module

    monkeypatch.setattr(Bodies, "compiled", counted)
    plain = run_alone(made, Executor(made.program, made.lengths))
    for _ in range(2):
        executor = Executor(made.program, made.lengths, check_types=True, compiler="eager")
        assert difference(run_alone(made, executor), plain) == 0
    # The first layer's sum of embeddings, and what the last layer is followed by, are their own.
    assert len(compiled) <= len(found) / 2
    assert len(found) > 8


def test_a_length_that_comes_once_is_not_worth_compiling() -> None:
    made = one_rank("dense-4l-tiny")
    executor = Executor(made.program, made.lengths, compiler="eager", at_once=False)
    before = len(executor.steps)
    first = run_alone(made, executor)
    assert len(executor.steps) < before
    assert difference(run_alone(made, executor), first) < 1e-6


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason=NO_COMPILER)
@pytest.mark.filterwarnings("ignore")  # of torch's, about itself
def test_inductor_computes_the_same() -> None:
    x = torch.randn(1, 6, 8)
    module = Chains().eval()
    with rc.Session(program_of(module, x), backend="lockstep", compiler="inductor") as session:
        found = session.run((x,))
    assert bodies_of("inductor").refusal is None
    assert len(bodies_of("inductor")._known) >= 2
    with torch.no_grad():
        assert difference(found, module(x)) < 1e-6


def failing(*args: Any) -> Any:
    raise ValueError("no such target\nand much more")


REFUSALS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no compiler": (
        lambda patch: patch.setattr(groups.shutil, "which", lambda name: None), NO_COMPILER,
    ),
    "the compiler fails": (
        lambda patch: patch.setattr(torch._inductor, "compile", failing),
        "torch's compiler failed: no such target",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_compiled_runs_op_by_op(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, why = REFUSALS[case]
    x = torch.randn(1, 6, 8)
    module = Chains().eval()
    program = program_of(module, x)
    prepare(monkeypatch)
    with rc.Session(program, backend="lockstep", compiler="inductor") as session:
        found = session.run((x,))
    with torch.no_grad():
        assert difference(found, module(x)) < 1e-6
    assert bodies_of("inductor").refusal == why
    runner = runner_of(program.rank(0), "inductor")
    note = f"some fused groups run op by op instead of as one kernel: {why}"
    assert runner.notes() == (note,)
    assert runner.notes() == ()


def runner_of(program: Program, compiler: str | None, device: str = "cpu") -> Runner:
    weights = OpenWeights(None, torch.device(device))
    return Runner(lambda kind: program, weights, Settings(compiler=compiler))


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        (Settings(), "cpu", None),
        (Settings(compiler="inductor"), "cpu", "inductor"),
        (Settings(), "cuda", "inductor"),
        (Settings(compiler="eager"), "cuda", "eager"),
        (Settings(check_finite=True), "cuda", None),
        (Settings(check_types=True), "cuda", None),
        (Settings(trace=True), "cuda", None),
    ],
    ids=str,
)
def test_who_compiles_groups(settings: Settings, device: str, expected: str | None) -> None:
    assert settings.compiler_on(torch.device(device)) == expected


def test_the_benchmark_runs_both_sides() -> None:
    found = fused.compare("llama-tiny", 48, 2, "eager")
    assert found["fused"] > 0
    assert found["ratio"] > 0
