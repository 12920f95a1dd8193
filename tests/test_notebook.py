"""What a notebook shows: short texts of programs, reports and plans; planning from Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringcompile as rc
from ringcompile.ir.program import Program
from tests.support import zoo_program


def captured() -> Program:
    return zoo_program("llama-tiny", "llama-tiny", sequence=24)


def test_programs_are_one_line_each() -> None:
    parallel = rc.transform(captured(), "ring=2")
    assert repr(captured()) == "<Program llama-tiny: 86 ops, one device>"
    assert repr(parallel) == "<ParallelProgram llama-tiny: ring=2, zigzag, 2 ranks>"
    assert str(parallel) == "ParallelProgram llama-tiny: ring=2, zigzag, 2 ranks"
    assert repr(parallel.rank(1)).endswith("ops, ring=2, rank 1 of 2 (ring=1)>")
    assert parallel.notes == parallel.program.notes
    assert "&gt;" not in parallel._repr_html_()
    assert parallel.rank(0)._repr_html_().startswith("<pre>// model llama-tiny")


def test_reports_and_plans_are_texts() -> None:
    report = str(rc.check(captured(), "ring=2"))
    assert report.startswith("llama-tiny with ring=2, order zigzag\n")
    assert "\nblocks.0.attention (transformer.py:" in report
    assert report.endswith("\nsupported")
    parallel = rc.transform(captured(), "ring=2")
    assert str(rc.verify(parallel)) == "2 ranks fit together, 4 transfers"
    plans = rc.plan(captured(), 2, seq=1024)
    assert "M tokens/s" in str(plans[0])
    assert plans[0].tps is not None
    found = rc.simulate(parallel, seq=1024)
    assert len(found.ranks) == 2
    assert found.seconds > 0


def test_a_mesh_is_its_spec() -> None:
    assert rc.Mesh("ring=4,tp=2") == rc.Mesh((("ring", 4), ("tp", 2)))
    assert rc.Mesh("ring=4,tp=2") == rc.Mesh.parse("ring=4,tp=2")
    assert repr(rc.Mesh("ring=4")) == "Mesh('ring=4')"
    assert rc.transform(captured(), rc.Mesh("ring=2")).world_size == 2


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (lambda: rc.Mesh("ring:4"), "cannot read 'ring:4' in the parallel spec 'ring:4'",
         "write axis=size pairs separated by commas, for example ring=4"),
        (lambda: rc.transform(torch.nn.Linear(2, 2), "ring=2"),  # type: ignore[arg-type]
         "transform takes a captured program, not Linear: capture it first",
         "rc.transform(rc.capture(model, (example_input,)), spec)"),
        (lambda: rc.simulate(rc.transform(captured(), "ring=2", length=64), seq=128),
         "the program is for 64 tokens, but seq is 128", None),
    ],
)
def test_what_is_refused(call: Any, message: str, hint: str | None) -> None:
    with pytest.raises(rc.RingCompileError) as raised:
        call()
    assert (raised.value.message, raised.value.hint) == (message, hint)
