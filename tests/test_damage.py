"""Damaged artifacts are found by `verify --numerics`, also where all ranks are damaged alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import fx

import ringcompile as rc
from ringcompile import artifact
from tests import damage
from tests.damage import MODELS, WEIGHT_KINDS, Trial, compiled, damaged, found, trial, trials_from
from tests.damage_kinds import KINDS

FEW, MANY = range(4), 200
AT_LEAST = 195
NAMED = ("capacity", "vocabulary")


@pytest.mark.parametrize(
    "name", [*NAMED, *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in NAMED)])
def test_what_is_not_damaged_passes(name: str, tmp_path: Path) -> None:
    compiled(name).save(tmp_path / "out")
    assert found(tmp_path / "out") == ""


def saved_with(
    name: str, folder: Path, fits: Callable[[fx.Node], bool], place: int, value: Any,
    rank: int | None = None,
) -> None:
    """Save a model with another argument of a call: of one rank, or of all alike."""
    right = compiled(name)
    program = damage.copied(right.program if rank is None else right.rank(rank))
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and fits(node)]
    assert nodes
    for node in nodes:
        node.args = (*node.args[:place], value, *node.args[place + 1 :])
    if rank is None:
        spmd, ranks = program, rc.ParallelProgram(program, right.mesh).ranks()
    else:
        spmd = right.program
        ranks = [program if i == rank else right.rank(i) for i in range(right.world_size)]
    artifact.save(folder, spmd=spmd, ranks=ranks, mesh=right.mesh, source=right.source,
                  options={}, reference=right.reference, cross_checked=True)


def named(op: str, argument: object = None, place: int = 1) -> Callable[[fx.Node], bool]:
    return lambda node: str(node.target) == op and argument in (None, node.args[place])


def test_a_key_mask_that_no_rank_applies(tmp_path: Path) -> None:
    saved_with("masked encoder", tmp_path, named("ringcompile.ring_attention.default"), 3, None)
    assert "output 'last_hidden_state' at " in found(tmp_path)


def test_one_ranks_vocabulary_that_begins_elsewhere(tmp_path: Path) -> None:
    saved_with("vocabulary", tmp_path, named("aten.sub.Scalar", 256), 1, 255, rank=2)
    assert found(tmp_path)


def test_every_share_of_a_vocabulary_cut_to_two_rows(tmp_path: Path) -> None:
    saved_with("vocabulary", tmp_path, named("aten.clamp.default", 127, 2), 2, 1)
    assert "output 'output' at " in found(tmp_path)


def test_rows_of_an_embedding_that_are_zero(tmp_path: Path) -> None:
    damage.damage_weights(
        "vocabulary", "a row of zeros", random.Random(0), tmp_path / "out", "head.weight")
    assert "weight 'head.weight' in 'weights.safetensors' was changed" in found(tmp_path / "out")


def test_a_constant_capacity_that_all_ranks_lack(tmp_path: Path) -> None:
    saved_with("capacity", tmp_path, named("aten.le.Scalar", 24), 1, 500)
    message = found(tmp_path)
    assert "output 'output' at " in message
    assert int(message.partition("--seq ")[2].split()[0]) > 24


def test_a_constant_capacity_that_the_first_rank_alone_exceeds_late(tmp_path: Path) -> None:
    saved_with("capacity", tmp_path, named("aten.le.Scalar", 24), 1, 25, rank=0)
    assert found(tmp_path)


def test_a_window_that_is_wider_on_all_ranks(tmp_path: Path) -> None:
    right = compiled("window")
    program = damage.copied(right.program)
    for node in program.graph.nodes:
        if node.kwargs.get("upper") is not None and isinstance(node.kwargs["upper"], int):
            node.kwargs = {**node.kwargs, "upper": node.kwargs["upper"] + 1}
    artifact.save(tmp_path, spmd=program, mesh=right.mesh, source=right.source, options={},
                  ranks=rc.ParallelProgram(program, right.mesh).ranks(),
                  reference=right.reference, cross_checked=True)
    assert found(tmp_path)


@pytest.mark.parametrize("seed", FEW)
def test_damage_is_found_or_changes_nothing(seed: int) -> None:
    done = trial(seed)
    assert done.said or not done.matters, done


def test_a_seed_is_replayed(tmp_path: Path) -> None:
    assert damaged(5, tmp_path / "a") == damaged(5, tmp_path / "b")
    files = [{f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_of_200_damages_195_are_found() -> None:
    trials: list[Trial] = list(trials_from(FEW.stop, MANY))
    report = damage.summary(trials)
    print(report)
    real = [one for one in trials if one.matters]
    assert sum(bool(one.said) for one in real) >= AT_LEAST, report
    assert {one.damage.model for one in trials} == set(MODELS)
    assert {one.damage.kind for one in real} >= {*KINDS, *WEIGHT_KINDS} - {"fill", "dim"}
