"""A rank whose program does not follow from the program for all ranks is found by its graph."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ringcompile import compiler, execution
from ringcompile.artifact.graph import program_from_json
from ringcompile.artifact.ops import allowed_ops
from ringcompile.capture.export import capture
from ringcompile.commands.overlap import schedule_for
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.origin import check_origin
from ringcompile.ir.serialize import program_to_json
from ringcompile.parallel_program import ParallelProgram
from ringcompile.pass_list import prepare
from tests.artifact.test_damage import resign
from tests.mutants import Mutant, kinds_of, mutant
from tests.support import zoo_program
from tests.test_ops_across_the_sequence import H, Lambda

WINDOW, LENGTH = 5, 32


def windowed(x: torch.Tensor) -> torch.Tensor:
    heads = x.view(*x.shape[:2], 3, H // 3).transpose(1, 2)
    place = torch.arange(x.shape[1])
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < WINDOW)
    out = F.scaled_dot_product_attention(heads, heads * 2, heads - 1, attn_mask=seen)
    return out.transpose(1, 2).reshape(x.shape)


ARTIFACTS = {
    "dense": ("llama-tiny", "ring=4"),
    "experts": ("moe-4l-tiny", "ring=2,tp=2"),
    "stages": ("gpt-tiny", "pp=2,tp=2"),
    "window": ("window", "ring=4"),
}


@cache
def compiled(name: str) -> ParallelProgram:
    model, spec = ARTIFACTS[name]
    if model == "window":
        module = Lambda(windowed).eval()
        return transform(capture(module, (torch.randn(1, LENGTH, H),)), spec, length=LENGTH)
    return transform(zoo_program(model), spec)


def mutants(name: str, seeds: range, step: int = 1) -> Iterator[tuple[int, Mutant]]:
    """One of every kind that has a site, or of every `step`th kind, for each seed."""
    parallel = compiled(name)
    programs = [program_to_json(program) for program in parallel.ranks()]
    for seed in seeds:
        for i, kind in list(enumerate(kinds_of(programs[0])))[::step]:
            rank = (seed + i) % parallel.world_size
            made = mutant(programs[rank], kind, seed)
            if made is not None:
                yield rank, made


@cache
def derived(name: str) -> ParallelProgram:
    """What follows from the program for all ranks as it is read back from a file."""
    saved = program_to_json(compiled(name).program)
    return ParallelProgram(program_from_json(saved, allowed_ops()), compiled(name).mesh)


def found(name: str, rank: int, made: Mutant) -> str:
    """What is said of a mutant; empty where nobody notices."""
    try:
        program = program_from_json(made.data, allowed_ops())
        check_origin(rank, program, derived(name).rank(rank))
    except RingCompileError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_sample_of_mutants_is_found(name: str) -> None:
    sample = list(mutants(name, range(1), step=6 if name != "experts" else 14))
    assert len(sample) > (7 if name != "experts" else 4)
    said = {made.kind: found(name, rank, made) for rank, made in sample}
    assert [kind for kind, text in said.items() if "%" not in text] == []


@pytest.mark.slow
def test_mutants_of_every_kind_are_found() -> None:
    """All of them; what is said names the node, or is about the file as a whole."""
    kinds: Counter[str] = Counter()
    missed, unnamed, total = [], [], 0
    for name in ARTIFACTS:
        for rank, made in mutants(name, range(1)):
            total += 1
            kinds[made.kind.partition(" in ")[0]] += 1
            kinds[made.kind] += 1
            said = found(name, rank, made)
            if not said:
                missed.append((name, made.kind, made.node))
            elif "%" not in said:
                unnamed.append((name, made.kind, said))
    assert missed == []
    assert len(kinds) > 40
    assert total > 300
    assert len(unnamed) < total / 20, unnamed


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_is_read_back_follows_from_its_origin(name: str, tmp_path: Path) -> None:
    parallel = compiled(name)
    parallel.save(tmp_path / "out")
    compiler.load(tmp_path / "out").verify()


def test_an_order_for_some_hardware_follows_as_well(tmp_path: Path) -> None:
    """It is not made again, for it depends on times; what is in it must still be right."""
    program = prepare(zoo_program("llama-tiny"))
    plain = transform(program, "ring=4")
    schedule = schedule_for("schedule", "h100x16", program, plain.mesh, None)
    parallel = transform(program, "ring=4", schedule=schedule)
    orders = [[n.name for n in made.rank(1).graph.nodes] for made in (plain, parallel)]
    assert orders[0] != orders[1]
    parallel.save(tmp_path / "out")
    compiler.load(tmp_path / "out").verify()
    unclaimed = replace(parallel.rank(1), passes=plain.rank(1).passes)
    with pytest.raises(RingCompileError, match=r"has %\w+ where %\w+ follows"):
        check_origin(1, unclaimed, plain.rank(1))


def test_a_scale_on_one_rank_is_named_with_its_line(tmp_path: Path) -> None:
    """By `verify`, and by `run`, for the manifest's claim was about other programs."""
    folder = tmp_path / "out"
    compiled("dense").save(folder)
    data = json.loads((folder / "rank2.json").read_text())
    node = next(n for n in data["nodes"] if isinstance(n.get("kwargs", {}).get("scale"), float))
    before = node["kwargs"]["scale"]
    node["kwargs"]["scale"] = before / 2
    (folder / "rank2.json").write_text(json.dumps(data))
    resign(folder)
    message = (
        rf"models/transformer.py:\d+: error: rank 2: argument 'scale' of %{node['name']} is "
        rf"{before / 2}, but the program for all ranks implies {before}\n"
    )
    for use in (
        lambda made: execution.verify(made),
        lambda made: execution.run(made, (torch.arange(16)[None],)),
    ):
        with pytest.raises(RingCompileError) as caught:
            use(compiler.load(folder))
        assert re.search(message, str(caught.value)), str(caught.value)


def test_a_program_for_all_ranks_that_cannot_be_lowered_is_one_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    compiled("dense").save(folder)
    data = json.loads((folder / "program.json").read_text())
    for node in data["nodes"]:
        if "attention" in node["op"]:
            node["args"][0] = node["args"][1]
    (folder / "program.json").write_text(json.dumps(data))
    resign(folder)
    with pytest.raises(RingCompileError):
        execution.verify(compiler.load(folder))
