"""Ranks that differ in what they run are refused before the first message, all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ringcompile import artifact
from ringcompile.errors import RingCompileError
from ringcompile.runtime.handshake import facts_of
from ringcompile.runtime.launcher import LocalRanks, launch
from tests.artifact.support import compile_model, save_model
from tests.runtime import rank_functions

HINT = "\n  hint: give all hosts the same copy of the artifact, and the same versions"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({2: {"artifact": "b"}},
         "error: rank 2 runs another artifact than rank 0: b, rank 0 has a"),
        ({1: {"torch": "2.11"}, 2: {"torch": "2.11"}},
         "error: ranks 1, 2 run another torch than rank 0: 2.11, rank 0 has 2.13"),
        ({1: {"set of ops": "0" * 64}},
         f"error: rank 1 runs another set of ops than rank 0: {'0' * 16}, rank 0 has x"),
        ({0: {"number of ranks": "4"}},
         "error: ranks 1, 2 run another number of ranks than rank 0: 3, rank 0 has 4"),
    ],
    ids=["same", "artifact", "torch", "ops", "ranks"],
)
def test_ranks_that_differ_are_named_on_all_ranks(
    changes: dict[int, dict[str, str]], message: str
) -> None:
    same = {"artifact": "a", "number of ranks": "3", "torch": "2.13", "set of ops": "x"}
    everyones = [{**same, **changes.get(rank, {})} for rank in range(3)]
    heard = launch(rank_functions.state_facts, 3, (everyones,), threads=1)
    assert heard == [message + HINT if message else ""] * 3


def test_the_facts_are_what_a_number_depends_on() -> None:
    facts = facts_of("digest", 4)
    assert list(facts) == ["artifact", "number of ranks", "ringcompile", "torch", "set of ops"]
    assert facts["torch"] == torch.__version__
    assert facts_of("other", 4) != facts != facts_of("digest", 2)


def test_copies_with_other_weights_or_numbers_are_refused(tmp_path: Path) -> None:
    """They would exchange tensors of the right shapes: wrong numbers, exit code 0."""
    parallel = compile_model("llama-tiny")
    one = save_model(parallel, tmp_path / "one")

    def other(name: str) -> torch.Tensor:
        return parallel.source(name) + (1e-3 if name.endswith("norm.weight") else 0)

    two = save_model(parallel, tmp_path / "two", source=other)
    folders = [str(one), str(two)]
    with pytest.raises(RingCompileError, match="rank 1 runs another artifact than rank 0"):
        launch(rank_functions.open_each, 2, (folders,), threads=1)
    shutil.rmtree(two)
    shutil.copytree(one, two)  # a copy on another host is the same artifact
    launch(rank_functions.open_each, 2, (folders,), threads=1)


def test_an_artifact_that_is_replaced_meanwhile_is_not_run(tmp_path: Path) -> None:
    folder = save_model(compile_model("llama-tiny"), tmp_path / "out")
    opened = artifact.load(folder)
    save_model(compile_model("gpt-tiny"), folder, overwrite=True)
    options: dict[str, Any] = {"threads": 1, "identity": opened.identity}
    with pytest.raises(RingCompileError, match="was replaced while the ranks were started"):
        LocalRanks(artifact.load, (folder,), **options)
