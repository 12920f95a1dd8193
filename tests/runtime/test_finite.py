"""`run --check` names the first op, line and rank where a number stops being finite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile import artifact
from ringcompile.capture.export import capture
from ringcompile.cli import cli
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.launcher import LocalRanks
from ringcompile.runtime.runner import Settings
from tests.support import zoo_program

HINT = "\n  hint: run the model itself in float32, or look at the layers before it"


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        y = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(y, y, y).transpose(1, 2).reshape(x.shape)
        x = torch.exp(x)
        return self.layers[1](x - x)


@pytest.fixture(scope="module")
def fragile() -> ParallelProgram:
    torch.manual_seed(0)
    return transform(capture(Fragile().eval(), (torch.randn(1, 12, 8),)), "ring=2",
                     order="contiguous")


def run(parallel: ParallelProgram, inputs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = run_lockstep(
        parallel.ranks(), parallel.mesh, parallel.source, (inputs,), check_finite=True
    ).outputs
    return found


def test_finite_numbers_go_through(fragile: ParallelProgram) -> None:
    inputs = torch.randn(1, 12, 8)
    plain = run_lockstep(fragile.ranks(), fragile.mesh, fragile.source, (inputs,)).outputs
    assert torch.equal(run(fragile, inputs), plain)


@pytest.mark.parametrize("name", ["llama-tiny", "mixtral-tiny", "gpt-tiny", "bert-tiny"])
def test_infinities_of_masks_are_no_fault(name: str) -> None:
    parallel = transform(zoo_program(name), "ring=2")
    run_lockstep(
        parallel.ranks(), parallel.mesh, parallel.source, zoo.build(name, sequence=13)[1],
        check_finite=True,
    )


def test_an_overflow_is_named_on_its_rank(fragile: ParallelProgram) -> None:
    """The row that overflows lies on rank 1; attention is over all, so both would show it."""
    inputs = torch.randn(1, 12, 8)
    inputs[0, 11] = 3e3
    with pytest.raises(RingCompileError) as caught:
        run(fragile, inputs)
    message = (
        r"test_finite\.py:\d+: error: rank [01]: the first infinity appears in the result of "
        r"aten\.exp\.default, which reads none\n    x = torch\.exp\(x\)\n  node: %exp"
    )
    assert re.search(message, str(caught.value)), str(caught.value)
    assert str(caught.value).endswith(HINT)


def test_a_weight_that_holds_nan_is_named(fragile: ParallelProgram) -> None:
    def source(name: str) -> torch.Tensor:
        found: torch.Tensor = fragile.source(name)
        return found * float("nan") if name == "layers.1.bias" else found

    with pytest.raises(RingCompileError, match="a weight or an input, holds NaN") as caught:
        run_lockstep(fragile.ranks(), fragile.mesh, source, (torch.randn(1, 12, 8),),
                     check_finite=True)
    assert "bias" in caught.value.message
    assert "return self.layers[1](x - x)" in str(caught.value)


def test_processes_say_the_same(fragile: ParallelProgram, tmp_path: Path) -> None:
    fragile.save(tmp_path / "out")
    inputs = torch.randn(1, 12, 8)
    inputs[0, 11] = 3e3
    options = {"backend": "gloo", "settings": Settings(check_finite=True), "threads": 1}
    with LocalRanks(artifact.load, (tmp_path / "out",), **options) as ranks, pytest.raises(
        RingCompileError, match=r"the first infinity appears in the result of aten\.exp"
    ):
        ranks.run((inputs,))


def test_on_the_command_line(fragile: ParallelProgram, tmp_path: Path) -> None:
    fragile.save(tmp_path / "out")
    torch.save({"x": torch.full((1, 12, 8), 3e3)}, tmp_path / "in.pt")
    with pytest.raises(RingCompileError, match="the first infinity"):
        cli.main(["run", str(tmp_path / "out"), "--inputs", str(tmp_path / "in.pt"), "--check",
                  "--backend", "lockstep"], standalone_mode=False)
